for (const plot of document.querySelectorAll(".plot")) {
  const { data, layout } = JSON.parse(plot.nextElementSibling.textContent);
  // A finger on a plot scrolls the page.
  if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false;
  Plotly.newPlot(plot, data, layout, { displayModeBar: false, responsive: true });
}
