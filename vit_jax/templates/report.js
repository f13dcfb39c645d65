// Says what a cell of the matrix means, under the pointer or by the arrow keys.
const cells = document.querySelector(".cells");
if (cells) {
  const { names, counts } = JSON.parse(document.getElementById("confusion").textContent);
  const k = names.length, mark = cells.querySelector("i"), said = document.querySelector("output");
  const total = row => Object.values(counts[row]).reduce((a, b) => a + b, 0);
  let row = 0, column = 0;
  const show = (r, c) => {
    row = Math.min(Math.max(r, 0), k - 1), column = Math.min(Math.max(c, 0), k - 1);
    Object.assign(mark.style, { display: "block", width: 100 / k + "%", height: 100 / k + "%",
      left: 100 * column / k + "%", top: 100 * row / k + "%" });
    said.textContent = `${counts[row][column] || 0} of ${total(row)} images of ${names[row]} `
      + `are said to be ${names[column]}.`;
  };
  const point = event => {
    const box = cells.querySelector("img").getBoundingClientRect();
    show(Math.floor((event.clientY - box.top) / box.height * k),
      Math.floor((event.clientX - box.left) / box.width * k));
  };
  cells.onpointermove = cells.onpointerdown = point;
  cells.onfocus = () => show(row, column);
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  cells.onkeydown = event => {
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    show(row + move[0], column + move[1]);
  };
}
