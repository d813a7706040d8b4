"""Clips of spoken digits, by espeak-ng in several voices, with their texts beside them: data for the recipe ctc.

python benchmarks/spoken_words.py FOLDER [CLIPS]
"""

import random
import subprocess
import sys
from pathlib import Path

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-us+f2", "en-us+f4", "en-us+m3", "en-gb+f3", "en-gb+m5")


def speak(folder, count, seed=0):
    """Write so many clips of one to three digits, and the text of each; returns their names."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(count):
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 3)))
        voice, speed, pitch = draw.choice(VOICES), draw.randint(130, 200), draw.randint(30, 70)
        name = f"{number:05}"
        how = ["-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(folder / f"{name}.wav")]
        subprocess.run(["espeak-ng", *how, text], check=True, timeout=60)
        (folder / f"{name}.txt").write_text(text + "\n")
        names.append(name)
    return names


if __name__ == "__main__":
    where, *count = sys.argv[1:]
    print(f"{len(speak(Path(where), int(*count or (2000,))))} clips in {where}")
