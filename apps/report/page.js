// Draws the charts: data from the page, colours from its style, one layer at a time where there are several.
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const config = { displayModeBar: false };
  const LEGEND_ROW = 20, NARROW = 460; // pixels

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // A copy: plotly writes into the layout that it is given.
  function themed(figure, width) {
    const copy = structuredClone(figure.layout);
    const axis = { gridcolor: color("--grid"), zerolinecolor: color("--grid"), linecolor: color("--grid"), automargin: true };
    const columns = width < NARROW ? 1 : 2;
    const rows = Math.ceil(figure.data.length / columns);
    copy.legend.entrywidth = 1 / columns;
    for (const name of ["xaxis", "yaxis"]) if (copy[name]?.title) copy[name].title.standoff = 8;
    return Object.assign(copy, {
      width,
      height: copy.height + LEGEND_ROW * rows,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 13, color: color("--text") },
      hoverlabel: { bgcolor: color("--page"), bordercolor: color("--grid"), font: { color: color("--text") }, align: "left" },
      xaxis: Object.assign({}, axis, copy.xaxis),
      yaxis: Object.assign({}, axis, copy.yaxis),
    });
  }

  function draw(chart) {
    const named = figures[chart.dataset.figure];
    const control = document.querySelector(`input[data-controls="${chart.dataset.group}"]`);
    const figure = Array.isArray(named) ? named[control ? Number(control.value) : 0] : named;
    return Plotly.react(chart, structuredClone(figure.data), themed(figure, chart.clientWidth), config);
  }

  const charts = [...document.querySelectorAll(".chart")];
  const drawAll = () => Promise.all(charts.map(draw));

  for (const control of document.querySelectorAll("input[data-controls]")) {
    const labels = JSON.parse(control.dataset.labels);
    const told = document.getElementById(control.dataset.told);
    control.addEventListener("input", () => {
      told.textContent = labels[control.value];
      control.setAttribute("aria-valuetext", labels[control.value]);
      charts.filter((chart) => chart.dataset.group === control.dataset.controls).forEach(draw);
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  let pending = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(pending);
    pending = requestAnimationFrame(drawAll);
  });
  drawAll().then(() => document.documentElement.setAttribute("data-drawn", String(charts.length)));
})();
