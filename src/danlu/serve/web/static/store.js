// The conversation: an array of turns, each a question and the versions of its answer, kept in this tab's session storage.
// version = { text, seed, vote: "up" | "down" | "none", state: "running" | "done" | "stopped" | "cut" | "error", error }

const CHAT = "danlu.chat";
const KEY = "danlu.key";

function read(name) {
  try {
    return sessionStorage.getItem(name);
  } catch {
    return null; // storage may be forbidden: the page works without it
  }
}

function write(name, value) {
  try {
    sessionStorage.setItem(name, value);
  } catch {
    // forbidden or full
  }
}

export function loadTurns(model) {
  try {
    const saved = JSON.parse(read(CHAT));
    // Answers of another model must not be voted on under this one's name.
    if (saved?.model !== model || !Array.isArray(saved.turns)) return [];
    for (const turn of saved.turns) {
      for (const version of turn.versions) {
        if (version.state === "running") version.state = "stopped"; // the page was left in the middle of it
      }
    }
    return saved.turns;
  } catch {
    return [];
  }
}

export const saveTurns = (model, turns) => write(CHAT, JSON.stringify({ model, turns }));
export const loadKey = () => read(KEY) ?? "";
export const saveKey = (key) => write(KEY, key);

export const shownVersion = (turn) => turn.versions[turn.shown];

// What the model is sent for turn `index`: turns without an answer's text are no part of the conversation.
export function messagesBefore(turns, index) {
  const messages = [];
  for (const turn of turns.slice(0, index)) {
    const { text } = shownVersion(turn);
    if (text.trim()) {
      messages.push({ role: "user", content: turn.question }, { role: "assistant", content: text });
    }
  }
  return [...messages, { role: "user", content: turns[index].question }];
}
