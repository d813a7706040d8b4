"""Speech written down by a trained model."""

from __future__ import annotations

from pathlib import Path

import torch

from hvdtrain.data.clips import normalised, read_wave
from hvdtrain.errors import DataError, one_line
from hvdtrain.recipes.transformers_models.auto_classes import load_trained, needs
from hvdtrain.recipes.transformers_models.hearing import CtcLoss, write_down
from hvdtrain.recipes.transformers_models.hearing_files import find_extractor, find_tokenizer
from hvdtrain.rundir.trained import Trained


class Listener:
    """Hears clips one at a time.

    Args:
        trained: the weights, and the files that say what they are.

    Raises:
        ConfigError: soundfile is not installed.
        DataError: model or tokenizer cannot be loaded.
    """

    def __init__(self, trained: Trained) -> None:
        needs("soundfile", "to hear a clip", "speech")
        needs("soxr", "to hear clips of any rate", "speech")
        self._tokenizer = find_tokenizer(str(trained.folder), False, is_needed=True)
        self._extractor = find_extractor(str(trained.folder))
        self._model = load_trained(trained, "AutoModelForCTC")

    @torch.no_grad()
    def write_down(self, path: Path) -> str:
        """Return what is said in a clip.

        Raises:
            DataError: it cannot be read, or is too short to hear anything in it.
        """
        try:
            wave = read_wave(path.expanduser(), self._extractor.sampling_rate)
        except Exception as error:  # decoders fail in many ways
            raise DataError(f"the clip {path} cannot be read ({one_line(error)})") from error
        if self._extractor.do_normalize and len(wave):
            wave = normalised(wave)
        device = next(self._model.parameters()).device
        length = torch.tensor([len(wave)], device=device)
        if not len(wave) or int(self._model._get_feat_extract_output_lengths(length)) < 1:  # type: ignore[operator]
            raise DataError(f"the clip {path} is too short: the model hears nothing in {len(wave)} frames")
        batch = (torch.from_numpy(wave)[None].to(device), length, length[:, None])
        alone = CtcLoss(self._tokenizer.pad_token_id, is_alone=True)
        return write_down(self._model, batch, alone, self._tokenizer)[0]
