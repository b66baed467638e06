"use strict";
/* Pictures in a grid and one by one, with what is in them drawn over as SVG; see viewer.py for the content.
   Names of files and classes are text from outside: they only ever go into textContent and title. */

for (const root of document.querySelectorAll(".viewer")) startViewer(root);

function startViewer(root) {
  const find = (name) => root.querySelector(`.v-${name}`);
  const content = JSON.parse(find("content").textContent);
  const pictures = content.pictures;
  const isTruth = (object) => object[1] === null;
  const all = pictures.flatMap((picture) => picture.objects);
  const classOf = (id) => content.classes[id] ?? ["?", "#999999", "#141414"];
  const hasTruth = all.some(isTruth);

  // What the controls say
  const off = new Set(); // classes that are switched off
  let threshold = content.start;
  const isShown = (object) =>
    !off.has(object[0]) && (isTruth(object) ? switches.truth.checked : switches.found.checked && object[1] >= threshold);
  const shownObjects = (picture) => picture.objects.filter(isShown);

  const slider = find("threshold");
  slider.min = Math.floor(content.lowest * 100) / 100;
  slider.max = 1;
  slider.value = threshold;
  slider.addEventListener("input", () => {
    threshold = Number(slider.value);
    update();
  });
  find("note").textContent = content.note;

  const switches = {};
  const addSwitch = (name, text, exists) => {
    const label = find("switch-template").content.firstElementChild.cloneNode(true);
    switches[name] = label.querySelector("input");
    label.querySelector("span").textContent = text;
    label.hidden = !exists;
    switches[name].classList.add(`v-switch-${name}`);
    switches[name].addEventListener("change", update);
    find("switches").append(label);
  };
  addSwitch("found", "Detected (solid, coloured)", hasTruth);
  addSwitch("truth", "Annotated (white, dashed)", hasTruth);
  for (const [name, text, exists] of [
    ["boxes", "Boxes", all.length > 0],
    ["masks", "Masks", all.some((object) => object[6])],
    ["keypoints", "Keypoints", all.some((object) => object[7]?.length)],
    ["names", "Names, on the large picture", all.length > 0],
  ]) addSwitch(name, text, exists);
  addSwitch("full", "Only pictures with objects", pictures.some((picture) => picture.objects.length === 0) || all.length > 0);
  switches.full.checked = false;

  // One switch per class that occurs, most frequent first
  const rows = new Map();
  const occurring = new Map();
  for (const object of all) occurring.set(object[0], (occurring.get(object[0]) ?? 0) + 1);
  for (const id of [...occurring.keys()].sort((a, b) => occurring.get(b) - occurring.get(a))) {
    const row = find("class-template").content.firstElementChild.cloneNode(true);
    row.querySelector(".v-class").textContent = classOf(id)[0];
    row.querySelector(".v-colour").style.background = classOf(id)[1];
    const input = row.querySelector("input");
    input.addEventListener("change", () => {
      if (input.checked) off.delete(id);
      else off.add(id);
      update();
    });
    rows.set(id, { input, number: row.querySelector(".v-number") });
    find("list").append(row);
  }
  const switchAll = (on) => {
    for (const [id, { input }] of rows) {
      input.checked = on;
      if (on) off.delete(id);
      else off.add(id);
    }
    update();
  };
  find("all").addEventListener("click", () => switchAll(true));
  find("none").addEventListener("click", () => switchAll(false));
  find("buttons").hidden = rows.size < 2;
  find("classes").hidden = rows.size === 0;
  find("options").open = window.matchMedia("(min-width: 60rem)").matches;

  // Marks: one group of SVG per object
  const space = root.querySelector("svg").namespaceURI;
  const draw = (group, classes, d) => {
    const path = document.createElementNS(space, "path");
    path.setAttribute("class", classes);
    path.setAttribute("d", d);
    group.append(path);
  };
  const drawLine = (group, classes, d) => {
    draw(group, `${classes} v-under`, d);
    draw(group, `${classes} v-over`, d);
  };
  const markOf = (object) => {
    const [id, , x1, y1, x2, y2, outline, points] = object;
    const group = document.createElementNS(space, "g");
    group.setAttribute("class", isTruth(object) ? "v-object v-truth" : "v-object");
    group.style.setProperty("--colour", classOf(id)[1]);
    if (outline) {
      draw(group, "v-mask v-area", outline);
      drawLine(group, "v-mask v-outline", outline);
    }
    drawLine(group, "v-box", `M${x1} ${y1}H${x2}V${y2}H${x1}z`);
    if (points?.length) {
      const at = (k) => `${points[3 * k]} ${points[3 * k + 1]}`;
      const links = content.links.filter(([a, b]) => points[3 * a + 2] && points[3 * b + 2]);
      drawLine(group, "v-points v-links", links.map(([a, b]) => `M${at(a)}L${at(b)}`).join(""));
      // A line of no length with round ends is a dot; its size is that of the screen.
      const dots = [];
      for (let k = 0; 3 * k < points.length; k++) if (points[3 * k + 2]) dots.push([points[3 * k + 2], `M${at(k)}h0`]);
      drawLine(group, "v-points v-dots", dots.map((dot) => dot[1]).join(""));
      draw(group, "v-points v-hidden v-over", dots.filter((dot) => dot[0] === 1).map((dot) => dot[1]).join(""));
    }
    return group;
  };
  const fill = (svg, picture) => {
    svg.setAttribute("viewBox", `0 0 ${picture.width} ${picture.height}`);
    const marks = picture.objects.map(markOf);
    svg.replaceChildren(...marks.slice().reverse()); // what comes first, the best score, lies on top
    return marks;
  };
  const refresh = (marks, picture) => picture.objects.forEach((object, n) => marks[n].toggleAttribute("hidden", !isShown(object)));
  const describe = (picture) => {
    const shown = shownObjects(picture);
    const found = shown.filter((object) => !isTruth(object)).length;
    if (!hasTruth) return `${found} object${found === 1 ? "" : "s"}`;
    return `${found}\u00a0detected, ${shown.length - found}\u00a0annotated`; // breaks at the comma only
  };

  // The grid: cards are made as far as one scrolls, and only those near the screen have marks
  const grid = find("grid"), end = find("end"), cards = [];
  const near = new Map();
  const nearby = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const svg = target.querySelector("svg"), picture = pictures[target.dataset.index];
      if (isIntersecting) {
        near.set(target, fill(svg, picture));
        refresh(near.get(target), picture);
      } else {
        near.delete(target);
        svg.replaceChildren();
      }
    }
  }, { rootMargin: "200px" });
  const addCards = (upTo) => {
    for (let n = cards.length; n < Math.min(upTo, pictures.length); n++) {
      const picture = pictures[n];
      if (picture.group && picture.group !== pictures[n - 1]?.group) {
        if (n) end.before(Object.assign(document.createElement("span"), { className: "v-end" }));
        end.before(Object.assign(document.createElement("h3"), { className: "v-group", textContent: picture.group }));
      }
      const card = find("card-template").content.firstElementChild.cloneNode(true);
      card.dataset.index = n;
      card.title = picture.name;
      card.style.setProperty("--ratio", picture.width / picture.height);
      card.querySelector("img").src = picture.source;
      card.querySelector(".v-label").textContent = picture.name.split("/").pop();
      card.addEventListener("click", () => open(n));
      cards.push(card);
      end.before(card);
      refreshCard(card);
      nearby.observe(card);
    }
  };
  const isListed = (n) => !switches.full.checked || pictures[n].objects.some(isShown);
  const refreshCard = (card) => {
    const n = Number(card.dataset.index);
    card.hidden = !isListed(n);
    card.querySelector(".v-count").textContent = describe(pictures[n]);
    if (near.has(card)) refresh(near.get(card), pictures[n]);
  };
  const atEnd = new IntersectionObserver((entries) => {
    if (!entries.at(-1).isIntersecting || cards.length === pictures.length) return;
    addCards(cards.length + 100);
    atEnd.unobserve(end); // to be told again if the end is still in sight
    atEnd.observe(end);
  }, { rootMargin: "1500px" });

  // The large picture. Its number is in the address, so that the browser's way back leads to the grid.
  const large = find("large"), frame = find("frame");
  let current = -1, marks = [], names = [], cameFromGrid = false;
  const nameOf = (object, picture) => {
    const [id, score, x1, y1, x2, y2, , , caption] = object;
    const [name, colour, text] = classOf(id);
    const item = document.createElement("li");
    const found = Object.keys(content.classes).length > 1 ? `${name} ${score?.toFixed(2)}` : score?.toFixed(2);
    item.textContent = score === null ? caption || "annotated" : found; // an only class needs no name
    item.style.setProperty("--colour", score === null ? "#fff" : colour);
    item.style.color = score === null ? "#141414" : text;
    const y = (score === null ? y2 : y1) / picture.height;
    item.classList.toggle("v-inside", score === null ? y < 0.95 : y < 0.05);
    item.style.top = `${100 * y}%`;
    if (x1 > 0.7 * picture.width) item.style.right = `${100 * (1 - x2 / picture.width)}%`;
    else item.style.left = `${(100 * x1) / picture.width}%`;
    return item;
  };
  const showLarge = (n) => {
    const picture = pictures[n];
    current = n;
    frame.style.setProperty("--ratio", picture.width / picture.height);
    find("picture").src = picture.source;
    marks = fill(large.querySelector("svg"), picture);
    names = picture.objects.map((object) => nameOf(object, picture));
    find("names").replaceChildren(...names.slice().reverse());
    large.querySelector("figcaption b").textContent = picture.name;
    large.querySelector(".v-quiet").textContent = picture.note ?? "";
    if (large.hidden) {
      grid.hidden = true;
      large.hidden = false;
      find("room").scrollIntoView({ block: "nearest" });
    }
    frame.focus({ preventScroll: true });
    refreshLarge();
  };
  const refreshLarge = () => {
    if (current < 0) return;
    refresh(marks, pictures[current]);
    refresh(names, pictures[current]);
    large.querySelector("figcaption .v-count").textContent = describe(pictures[current]);
    frame.setAttribute("aria-label", `${pictures[current].name}: ${describe(pictures[current])}`);
    find("place").textContent = `${current + 1} of ${pictures.length}`;
    find("previous").disabled = neighbour(-1) < 0;
    find("next").disabled = neighbour(1) < 0;
    const after = neighbour(1);
    if (after >= 0) new Image().src = pictures[after].source; // is there when it is asked for
  };
  const showGrid = () => {
    if (large.hidden) return;
    large.hidden = true;
    grid.hidden = false;
    addCards(current + 1);
    cards[current].focus();
    current = -1;
  };
  const neighbour = (by) => {
    let n = current + by;
    while (n >= 0 && n < pictures.length && !isListed(n)) n += by;
    return n < pictures.length ? n : -1;
  };
  const follow = () => {
    const number = /^#picture-(\d+)$/.exec(location.hash)?.[1];
    if (number && number >= 1 && number <= pictures.length) showLarge(number - 1);
    else showGrid();
  };
  const open = (n) => {
    cameFromGrid = true;
    location.hash = `picture-${n + 1}`;
  };
  const step = (by) => {
    const n = neighbour(by);
    if (n >= 0) location.replace(`#picture-${n + 1}`);
  };
  const close = () => {
    if (cameFromGrid) history.back();
    else location.replace("#pictures");
    cameFromGrid = false;
  };
  window.addEventListener("hashchange", follow);
  find("back").addEventListener("click", close);
  find("previous").addEventListener("click", () => step(-1));
  find("next").addEventListener("click", () => step(1));

  // A finger that moves sideways steps too; where the picture is enlarged it moves that
  let touched = null;
  const isEnlarged = () => visualViewport.scale > 1;
  visualViewport.addEventListener("resize", () => frame.classList.toggle("v-enlarged", isEnlarged()));
  frame.addEventListener("touchstart", ({ touches }) => {
    touched = touches.length === 1 && !isEnlarged() ? touches[0] : null;
  }, { passive: true });
  frame.addEventListener("touchend", ({ changedTouches: [{ clientX, clientY }] }) => {
    const by = touched ? clientX - touched.clientX : 0;
    if (Math.abs(by) > 50 && Math.abs(by) > 2 * Math.abs(clientY - touched.clientY)) step(by < 0 ? 1 : -1);
    touched = null;
  });

  // Keys: those that move a slider or a switch stay theirs
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const arrows = event.target.matches("input") ? {} : { ArrowRight: 1, ArrowLeft: -1 };
    const by = { j: 1, k: -1, ...arrows }[event.key];
    if (!large.hidden) {
      if (event.key === "Escape") close();
      else if (by) step(by);
      else return;
    } else if (by && (content.alone || grid.contains(document.activeElement))) {
      const from = cards.indexOf(document.activeElement);
      let n = from < 0 ? 0 : from + by;
      while (cards[n]?.hidden) n += by;
      cards[n]?.focus();
    } else return;
    event.preventDefault();
  });

  // All that follows slider and switches, at most once per frame of the screen
  let waiting = false;
  function update() {
    if (!waiting) requestAnimationFrame(updateNow);
    waiting = true;
  }
  const updateNow = () => {
    waiting = false;
    find("value").textContent = String(Math.round(threshold * 1000) / 1000);
    for (const name of ["boxes", "masks", "keypoints", "names"])
      root.classList.toggle(`v-no-${name}`, !switches[name].checked);
    const numbers = new Map();
    let found = 0, truths = 0, full = 0;
    for (const picture of pictures) {
      let any = false;
      for (const object of picture.objects) {
        if (!isTruth(object) && object[1] >= threshold) numbers.set(object[0], (numbers.get(object[0]) ?? 0) + 1);
        if (!isShown(object)) continue;
        if (isTruth(object)) truths++;
        else found++;
        any = true;
      }
      if (any) full++;
    }
    for (const [id, { number }] of rows) number.textContent = numbers.get(id) ?? 0;
    const objects = hasTruth ? `${found} detected, ${truths} annotated` : `${found} object${found === 1 ? "" : "s"}`;
    find("total").textContent = `${objects} in ${full} of ${pictures.length} pictures`;
    cards.forEach(refreshCard);
    refreshLarge();
  };

  addCards(100);
  updateNow();
  atEnd.observe(end);
  follow();
}
