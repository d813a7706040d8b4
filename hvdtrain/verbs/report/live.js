// Asks the server for what is new, and changes the page in place: a part that was zoomed to stays, and so does the axis.
(() => {
  const { seconds, version } = document.currentScript.dataset;
  let seen = version;
  const state = document.createElement("p");
  state.className = "soft";
  state.id = "live";
  state.setAttribute("role", "status");
  const say = (text) => { if (state.textContent !== text) state.textContent = text; };
  const clock = () => new Date().toLocaleTimeString();
  say(`Live: follows the run, as of ${clock()}; looks every ${seconds} s.`);
  document.querySelector("header").append(state);

  const unpacked = async (text) => {
    const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  const shapeOf = (page) => [...page.querySelectorAll("figure h3, input[name=axis], figcaption li > span:last-child")]
    .map((one) => one.value ?? (one.closest("li") ? one.textContent.split(": ").slice(0, -1).join() : one.textContent)).join("\n");
  const keyOf = (part) => part.querySelector("summary").textContent.replace(/\d+ |s\b/g, ""); // "1 warning" becomes "2 warnings"

  // The charts and what is chosen about them stay; all else in the page is what the new one has.
  const exchange = (next) => {
    const isKept = (part) => part.matches(".charts, fieldset, #trouble, noscript");
    const open = new Set([...document.querySelectorAll("main > details[open]")].map(keyOf));
    const main = document.querySelector("main");
    for (const part of [...main.children]) if (!isKept(part)) part.remove();
    let place = main.firstElementChild;
    for (const part of [...next.querySelector("main").children]) {
      if (isKept(part)) place = place?.nextElementSibling ?? null;
      else main.insertBefore(document.adoptNode(part), place);
    }
    for (const part of main.querySelectorAll(":scope > details")) part.open = open.has(keyOf(part));
    for (const caption of next.querySelectorAll("figcaption")) {
      const own = document.getElementById(caption.id), isOpen = own.querySelector("details")?.open;
      own.innerHTML = caption.innerHTML;
      if (isOpen) own.querySelector("details").open = true;
    }
    document.getElementById("settings").textContent = next.getElementById("settings").textContent;
  };

  const draw = (items) => {
    for (const [i, item] of Object.values(items).entries()) {
      const figure = Bokeh.documents[i].roots()[0];
      const there = Bokeh.documents[i].constructor.from_json(item.doc).roots()[0];
      if (there.renderers.length !== figure.renderers.length) return false;
      for (const [j, renderer] of figure.renderers.entries()) renderer.data_source.data = there.renderers[j].data_source.data;
    }
    return true;
  };

  const look = async () => {
    const answer = await fetch(`/now?seen=${seen}`, { cache: "no-store" });
    if (answer.status === 204) return;
    if (!answer.ok) throw new Error(await answer.text());
    const next = new DOMParser().parseFromString(await answer.text(), "text/html");
    const charts = next.getElementById("charts");
    // Another chart, or another curve in one: the page is built anew, as it was opened.
    if (shapeOf(next) !== shapeOf(document) || !charts || !document.documentElement.dataset.ready) return location.reload();
    if (!draw(JSON.parse(await unpacked(charts.textContent)))) return location.reload();
    exchange(next);
    seen = next.querySelector("script[data-version]").dataset.version;
    say(`Live: follows the run, as of ${clock()}; looks every ${seconds} s.`);
    document.documentElement.dataset.version = seen;
  };
  const lookAgain = async () => {
    if (!document.hidden) {
      try { await look(); } catch (error) { say(`No longer live (${error.message}): this is how the run was.`); }
    }
    setTimeout(lookAgain, 1000 * seconds);
  };
  setTimeout(lookAgain, 1000 * seconds);
})();
