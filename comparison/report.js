const charts = JSON.parse(document.getElementById("charts").textContent);
const controls = document.getElementById("controls");
const views = [];

function update() {
  const chosen = new FormData(controls);
  const values = {arms: chosen.getAll("arms"), seed: chosen.get("seed"), show: chosen.get("show")};
  for (const view of views) {
    const signals = view.getState().signals;
    for (const [name, value] of Object.entries(values)) {
      if (name in signals && value !== null) view.signal(name, value);
    }
    view.runAsync();
  }
}

for (const [id, specification] of Object.entries(charts)) {
  // ast: an interpreter, because the page forbids eval
  const result = await vegaEmbed("#" + id, specification, {renderer: "svg", actions: false, ast: true});
  views.push(result.view);
}
controls?.addEventListener("change", update);
if (controls) update();
document.documentElement.dataset.drawn = views.length;
