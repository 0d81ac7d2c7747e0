// An image or a player whose link does not answer says so, instead of a broken icon.
const WORDS = {
  IMG: "The image does not load. FLORA's links do not live for ever.",
  VIDEO: "The video does not play here: its link has expired, or the browser does not know its form.",
  AUDIO: "The sound does not play here: its link has expired, or the browser does not know its form.",
};

function broken(media) {
  const frame = media.closest(".frame");
  if (!frame || frame.nextElementSibling?.classList.contains("gone")) return;
  const note = document.createElement("p");
  note.className = "gone";
  note.textContent = WORDS[media.tagName];
  frame.classList.add("broken");
  frame.after(note);
}

document.addEventListener("error", (event) => {
  if (event.target instanceof Element && event.target.matches("[data-media]")) broken(event.target);
}, true);

// What failed before this module was there.
document.querySelectorAll("img[data-media]").forEach((image) => {
  if (image.complete && image.naturalWidth === 0 && image.currentSrc) broken(image);
});
document.querySelectorAll("video[data-media], audio[data-media]").forEach((media) => {
  if (media.error) broken(media);
});
