"use strict";
document.documentElement.classList.remove("no-script");
for (const slider of document.querySelectorAll("input[data-wipe]")) {
  const box = document.getElementById(slider.dataset.wipe);
  const move = () => box.style.setProperty("--at", slider.value + "%");
  slider.addEventListener("input", move);
  move();
}
for (const slider of document.querySelectorAll("input[data-strip]")) {
  const strip = document.getElementById(slider.dataset.strip);
  const frames = strip.querySelectorAll(".frame");
  const show = () => frames.forEach((frame, k) => frame.classList.toggle("on", k === Number(slider.value)));
  slider.addEventListener("input", () => {
    show();
    const frame = frames[Number(slider.value)];
    strip.scrollTo({ left: frame.offsetLeft - strip.offsetLeft - (strip.clientWidth - frame.clientWidth) / 2, behavior: "smooth" });
  });
  show();
}
// On paper nothing can be unfolded.
const folded = () => document.querySelectorAll("details:not([open])");
addEventListener("beforeprint", () => folded().forEach((d) => { d.open = true; d.dataset.folded = ""; }));
addEventListener("afterprint", () => document.querySelectorAll("details[data-folded]").forEach((d) => { d.open = false; }));
