// Unpacks Bokeh and the charts, which travel as gzip in base64, and connects the page's controls with them.
(async () => {
  const unpacked = async (id) => {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (sign) => sign.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  const figures = [];
  const settings = () => JSON.parse(document.getElementById("settings").textContent);

  const useAxis = (name) => {
    const { axes } = settings();
    for (const figure of figures.filter((one) => !one.tags.includes("fixed"))) {
      for (const renderer of figure.renderers) {
        for (const glyph of [renderer.glyph, renderer.nonselection_glyph, renderer.muted_glyph]) {
          if (glyph?.x) glyph.x = { field: name };
        }
      }
      figure.below[0].axis_label = axes[name].label;
      figure.below[0].formatter.format = axes[name].format;
    }
    setTimeout(useRange, 50); // once Bokeh knows where its curves lie now
  };
  const useRange = () => {
    const { ranges } = settings();
    for (const [i, figure] of figures.entries()) {
      figure.reset.emit();
      const usual = document.querySelector("input[name=usual]")?.checked ? ranges[i] : null;
      if (usual) [figure.y_range.start, figure.y_range.end] = usual;
    }
  };
  const showRun = (run, isShown) => {
    for (const figure of figures) {
      for (const renderer of figure.renderers) if (renderer.glyph.tags[0] === run) renderer.visible = isShown;
    }
  };

  for (const input of document.querySelectorAll("input[name=axis]")) input.addEventListener("change", () => useAxis(input.value));
  document.querySelector("input[name=usual]")?.addEventListener("change", useRange);
  for (const input of document.querySelectorAll("input[name=run]")) input.addEventListener("change", () => showRun(Number(input.value), input.checked));

  const sortBy = (head) => {
    const table = head.closest("table"), place = [...head.parentNode.children].indexOf(head);
    const isUp = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
    const key = (row) => row.children[place].dataset.value ?? row.children[place].textContent;
    const compare = (a, b) => (a === "") - (b === "") || (isUp ? 1 : -1) * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
    const rows = [...table.tBodies[0].rows].sort((a, b) => compare(key(a), key(b)));
    table.tBodies[0].append(...rows);
  };
  addEventListener("click", (event) => {
    const button = event.target.closest?.("th button");
    if (button) sortBy(button.parentNode);
  });
  addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("details[data-print]")) part.open = true; });

  // Chromium tells of a size that it passes on one frame later as if it were an error of the page.
  addEventListener("error", (event) => { if (event.message?.startsWith("ResizeObserver loop")) event.preventDefault(); });
  if (!document.getElementById("charts")) return;
  const library = document.createElement("script");
  library.textContent = await unpacked("bokeh");
  document.head.append(library);
  const isTouch = matchMedia("(pointer: coarse)").matches;
  const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  for (const [id, item] of Object.entries(JSON.parse(await unpacked("charts")))) {
    const view = await Bokeh.embed.embed_item(item, id);
    const figure = [...view][0].model;
    if (isTouch) figure.toolbar.active_drag = null; // a finger on a chart scrolls the page
    figures.push(figure);
    // A chart is there to be read, and the page can be scrolled, while the next ones are drawn. A page that nobody sees
    // paints nothing, and must not wait for it.
    if (!document.hidden) await painted();
    if (figures.length === 1) performance.mark("first curves");
  }
  performance.mark("all curves");
  document.documentElement.dataset.ready = String(figures.length);
})().catch((error) => {
  document.getElementById("trouble").hidden = false;
  console.error(error);
});
