// Images on which one patch after the other says what it attends to; the page's data are those of
// `explain.pages.attention_data`, and where on the image the grid lies.
for (const viewer of document.querySelectorAll(".viewer")) {
  const number = viewer.dataset.image;
  const known = JSON.parse(document.getElementById("attention" + number).textContent);
  const image = document.querySelector(`#image${number} img`);
  const canvas = viewer.querySelector("canvas"), said = viewer.querySelector("[role=status]");
  const blockSlider = viewer.querySelector(".block"), headSlider = viewer.querySelector(".head");
  const weights = Uint8Array.from(atob(known.weights), c => c.charCodeAt(0));
  const [rows, columns] = known.grid, tokens = known.first + rows * columns;
  const [top, left, height, width] = known.box;
  const blocks = [...new Set(known.layers.map(([block]) => block))];
  const headsOf = block => known.layers.filter(([b, head]) => b === block && head !== null).length;
  // Before the patches stand a class token and registers, or one of both, or neither.
  const registers = known.first - known.class_token;
  let query = known.class_token ? 0
    : known.first + Math.floor(rows / 2) * columns + Math.floor(columns / 2);

  const percent = x => (100 * x).toFixed(x < .0995 ? 1 : 0) + "%";
  const place = patch => `row ${Math.floor(patch / columns) + 1}, column ${patch % columns + 1}`;

  function show() {
    const block = blocks[blockSlider.value], heads = headsOf(block);
    headSlider.disabled = !heads;
    headSlider.max = Math.max(...blocks.map(headsOf));
    const head = heads && headSlider.value > 0 ? headSlider.value - 1 : null;
    const layer = known.layers.findIndex(([b, h]) => b === block && h === head);
    const start = (layer * tokens + query) * tokens, scale = known.top[layer * tokens + query];
    const row = weights.subarray(start, start + tokens);

    const blockText = `Block ${block + 1}`;
    const headText = head === null ? "Mean of all heads" : `Head ${head + 1}`;
    blockSlider.previousSibling.textContent = blockText;
    headSlider.previousSibling.textContent = headText;
    blockSlider.setAttribute("aria-valuetext", blockText);
    headSlider.setAttribute("aria-valuetext", headText);

    const context = canvas.getContext("2d"), w = canvas.width, h = canvas.height;
    const cell = patch => [
      w * (left + width * (patch % columns) / columns),
      h * (top + height * Math.floor(patch / columns) / rows), w * width / columns, h * height / rows
    ];
    context.drawImage(image, 0, 0, w, h);
    context.fillStyle = "rgba(0, 0, 0, .5)";
    context.fillRect(0, 0, w, h);
    const patches = [...row.subarray(known.first)];
    const most = Math.max(...patches, 1);
    patches.forEach((weight, patch) => {
      context.fillStyle = `rgba(255, ${120 + Math.round(110 * weight / most)}, 40, ${.7 * weight / most})`;
      context.fillRect(...cell(patch));
    });
    if (query >= known.first) {
      context.lineWidth = Math.max(2, w / 150);
      context.strokeStyle = "#4cc3ff";
      context.strokeRect(...cell(query - known.first));
    }
    const subject = query < known.first ? "The class token" : `The patch in ${place(query - known.first)}`;
    const best = patches.map((weight, patch) => [weight, patch]).sort(([a], [b]) => b - a).slice(0, 3);
    const share = weight => percent(weight / 255 * scale);
    const looks = best.map(([weight, patch]) => `${place(patch)} (${share(weight)})`);
    if (known.class_token) looks.push(`the class token (${share(row[0])})`);
    const inRegisters = row.subarray(known.first - registers, known.first).reduce((a, b) => a + b, 0);
    if (registers) looks.push(`all registers together (${share(inRegisters)})`);
    said.textContent = `${subject} attends to ${looks.join("; ")}.`;
  }

  function point(event) {
    const area = canvas.getBoundingClientRect();
    const x = ((event.clientX - area.left) / area.width - left) / width;
    const y = ((event.clientY - area.top) / area.height - top) / height;
    if (x < 0 || y < 0 || x >= 1 || y >= 1) return;
    query = known.first + Math.floor(y * rows) * columns + Math.floor(x * columns);
    show();
  }

  canvas.onpointermove = canvas.onpointerdown = point;
  canvas.onkeydown = event => {
    const moves = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
    if (!(event.key in moves)) return;
    event.preventDefault();
    const [down, right] = moves[event.key], patch = Math.max(query - known.first, 0);
    const row = Math.min(Math.max(Math.floor(patch / columns) + down, 0), rows - 1);
    const column = Math.min(Math.max(patch % columns + right, 0), columns - 1);
    query = known.first + row * columns + column;
    show();
  };
  const button = viewer.querySelector("button");
  button.hidden = !known.class_token;
  button.onclick = () => { query = 0; show(); };
  for (const slider of [blockSlider, headSlider]) {
    slider.min = slider.value = 0;
    slider.oninput = show;
  }
  headSlider.parentElement.hidden = !blocks.some(headsOf);
  blockSlider.max = blockSlider.value = blocks.length - 1;
  image.decode().then(() => {
    const [w, h] = [canvas.width, canvas.height] = [2 * image.naturalWidth, 2 * image.naturalHeight];
    canvas.style.width = `min(30rem, ${80 * w / h}vh)`;  // The whole of it fits the window.
    show();
  });
}
