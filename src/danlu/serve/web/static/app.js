// The chat page. All text of people and models is inserted as text, never as HTML.

import { chat, ServerError, vote as sendVote } from "./api.js";
import { loadTurns, messagesBefore, saveTurns, shownVersion } from "./store.js";

const { model, params, texts } = JSON.parse(document.getElementById("settings").textContent);
const $ = (id) => document.getElementById(id);
const [scroll, log, input, send, stop, notice] = ["scroll", "log", "input", "send", "stop", "notice"].map($);

let turns = loadTurns(model);
let views = [];
let running = null; // AbortController of the answer that is being written
let leaving = false; // the browser ends requests when the page is left

const save = () => saveTurns(model, turns);

// -- drawing ----------------------------------------------------------------------------------------------------------

const copyOf = (id) => $(id).content.firstElementChild.cloneNode(true);

function addView(index) {
  const question = copyOf("question-template");
  question.querySelector(".text").textContent = turns[index].question;
  const answer = copyOf("answer-template");
  const find = (name) => answer.querySelector(`.${name}`);
  const view = { answer, text: find("text"), note: find("note"), actions: find("actions"), find };
  find("previous").onclick = () => show(index, turns[index].shown - 1);
  find("next").onclick = () => show(index, turns[index].shown + 1);
  find("up").onclick = () => castVote(index, "up");
  find("down").onclick = () => castVote(index, "down");
  find("copy").onclick = () => copy(index);
  find("copy").hidden = !navigator.clipboard;
  find("again").onclick = () => regenerate(index);
  views.push(view);
  log.append(question, answer);
}

function noteOf(version) {
  if (version.state === "error") return version.error || texts.broken;
  if (version.state === "stopped") return texts.stopped;
  if (version.state === "cut") return texts.cut;
  return version.state === "done" && !version.text.trim() ? texts.empty : "";
}

function draw(index) {
  const turn = turns[index];
  const version = shownVersion(turn);
  const { answer, text, note, actions, find } = views[index];
  const isLast = index === turns.length - 1;
  const writing = version.state === "running";
  text.textContent = version.text;
  text.hidden = !version.text && !writing;
  note.textContent = noteOf(version);
  note.hidden = !note.textContent;
  answer.classList.toggle("writing", writing);
  answer.classList.toggle("failed", version.state === "error");
  answer.setAttribute("aria-busy", String(writing));
  actions.hidden = writing;
  // Later turns were said after the version shown, so only the last answer can be switched or made again.
  find("versions").hidden = turn.versions.length < 2 || !isLast;
  find("count").textContent = `${turn.shown + 1}/${turn.versions.length}`;
  find("previous").disabled = turn.shown === 0;
  find("next").disabled = turn.shown === turn.versions.length - 1;
  find("again").hidden = !isLast;
  for (const side of ["up", "down"]) {
    find(side).setAttribute("aria-pressed", String(version.vote === side));
    find(side).hidden = !version.text;
  }
  find("copy").hidden = !version.text || !navigator.clipboard;
}

function drawAll() {
  log.replaceChildren();
  views = [];
  turns.forEach((_, index) => addView(index));
  turns.forEach((_, index) => draw(index));
  $("welcome").hidden = turns.length > 0;
  scroll.scrollTop = scroll.scrollHeight;
}

function drawComposer() {
  send.hidden = running !== null;
  stop.hidden = running === null;
  send.disabled = !input.value.trim();
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

let noticeTimer = 0;
function say(text) {
  notice.textContent = text;
  notice.hidden = false;
  clearTimeout(noticeTimer);
  noticeTimer = setTimeout(() => { notice.hidden = true; }, 4000);
}

// -- what people do ---------------------------------------------------------------------------------------------------

function submit() {
  const question = input.value.trim();
  if (!question || running) return;
  input.value = "";
  turns.push({ question, versions: [], shown: 0 });
  addView(turns.length - 1);
  $("welcome").hidden = true;
  write(turns.length - 1);
  if (turns.length > 1) draw(turns.length - 2);
  input.focus();
}

function regenerate(index) {
  if (!running && index === turns.length - 1) write(index);
}

async function write(index) {
  const turn = turns[index];
  const controller = new AbortController();
  const version = { text: "", seed: crypto.getRandomValues(new Uint32Array(1))[0] >>> 1, vote: "none", state: "running", error: "" };
  turn.versions = [...turn.versions.filter((old) => old.text), version];
  turn.shown = turn.versions.length - 1;
  running = controller;
  draw(index);
  drawComposer();
  scroll.scrollTop = scroll.scrollHeight;
  save();
  const body = { model, messages: messagesBefore(turns, index), ...params, seed: version.seed };
  try {
    for await (const part of chat(body, { askKey, signal: controller.signal })) {
      if (controller.signal.aborted) break;
      if (part.text) grow(index, version, part.text);
      if (part.finish) version.state = part.finish === "length" ? "cut" : "done";
    }
  } catch (error) {
    version.state = controller.signal.aborted || leaving ? "stopped" : "error";
    version.error = error instanceof ServerError ? error.message : texts.offline;
  }
  if (version.state === "running") version.state = "stopped";
  // A new chat may have been started meanwhile.
  if (running === controller) running = null;
  if (turns[index] === turn) {
    atEnd(() => draw(index));
    save();
  }
  drawComposer();
}

function grow(index, version, piece) {
  version.text += piece;
  atEnd(() => views[index].text.append(piece));
  saveSoon();
}

// Follows the text unless the reader has scrolled up.
function atEnd(change) {
  const follows = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
  change();
  if (follows) scroll.scrollTop = scroll.scrollHeight;
}

let saveTimer = 0;
function saveSoon() {
  saveTimer ||= setTimeout(() => { saveTimer = 0; save(); }, 300);
}

function show(index, shown) {
  if (running) return;
  turns[index].shown = shown;
  draw(index);
  save();
}

async function castVote(index, side) {
  const turn = turns[index];
  const version = shownVersion(turn);
  const before = version.vote;
  const wanted = before === side ? "none" : side;
  const redraw = () => { if (turns[index] === turn && shownVersion(turn) === version) draw(index); };
  version.vote = wanted;
  redraw();
  try {
    const messages = messagesBefore(turns, index);
    await sendVote({ messages, answer: version.text, vote: wanted, params: { ...params, seed: version.seed } }, askKey);
  } catch (error) {
    version.vote = before;
    redraw();
    say(error instanceof ServerError && error.message ? `${texts.vote_failed} ${error.message}` : texts.vote_failed);
  }
  save();
}

async function copy(index) {
  try {
    await navigator.clipboard.writeText(shownVersion(turns[index]).text);
    say(texts.copied);
  } catch {
    // not allowed here
  }
}

function newChat() {
  running?.abort();
  running = null;
  turns = [];
  save();
  drawAll();
  drawComposer();
  input.focus();
}

// One dialog at a time, whoever asks.
let asking = null;
function askKey() {
  asking ??= new Promise((resolve) => {
    const [dialog, field] = [$("key-dialog"), $("key")];
    field.value = "";
    $("key-use").onclick = () => { resolve(field.value.trim()); dialog.close(); };
    $("key-cancel").onclick = () => dialog.close();
    field.onkeydown = (event) => { if (event.key === "Enter" && !isComposing(event)) $("key-use").click(); };
    dialog.onclose = () => resolve(null);
    dialog.showModal();
    field.focus();
  }).finally(() => { asking = null; });
  return asking;
}

// -- wiring -----------------------------------------------------------------------------------------------------------

// Enter that picks a word in an input method must not send; Safari ends the composition first and marks the key with 229.
const isComposing = (event) => event.isComposing || event.keyCode === 229;

input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !isComposing(event)) {
    event.preventDefault();
    submit();
  }
});
input.addEventListener("input", drawComposer);
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
stop.addEventListener("click", () => {
  running?.abort();
  input.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !isComposing(event) && !$("key-dialog").open) running.abort();
});
$("new-chat").addEventListener("click", newChat);
addEventListener("beforeunload", () => { leaving = true; });
addEventListener("pagehide", save);
addEventListener("pageshow", () => { leaving = false; });

drawAll();
drawComposer();
