// Shows what a mark says beside the pointer, and takes it away when the pointer leaves or another place is tapped.
const tip = document.getElementById("tip");
const show = (event) => {
  const mark = event.target.closest("[data-tip]");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.dataset.tip;
  const { offsetWidth: width, offsetHeight: height } = tip;
  tip.style.left = Math.max(4, Math.min(event.clientX + 12, innerWidth - width - 4)) + "px";
  tip.style.top = Math.max(4, Math.min(event.clientY + 12, innerHeight - height - 4)) + "px";
};
addEventListener("pointermove", show);
addEventListener("pointerdown", show);
