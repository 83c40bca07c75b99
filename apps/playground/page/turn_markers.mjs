// Plain text that a chat template writes between turns ("USER:"), with the rules of vlmguard's runtime/chat/turn_markers.py.

export class TurnMarkers {
  /** @param {{spellings: string[][], anyCase: boolean, beginsWord: boolean}[]} rules `chat.turnMarkers` of facts.json */
  constructor(rules) {
    this.patterns = rules.map(({ spellings, anyCase, beginsWord }) => {
      const body = spellings.map((parts) => parts.map(escaped).join("\\s*")).join("|");
      return new RegExp(`${beginsWord ? "(?<![\\p{L}\\p{N}])" : ""}(?:${body})`, anyCase ? "iu" : "u");
    });
  }

  /** The first marker in a text, as the text writes it; `null` if there is none. */
  foundIn(text) {
    const plain = simplified(text);
    const matches = this.patterns.map((pattern) => pattern.exec(plain)).filter((match) => match !== null);
    if (matches.length === 0) return null;
    const first = matches.reduce((one, other) => (other.index < one.index ? other : one));
    return first[0].split(/\s+/).join(" ");
  }
}

/** Full-width letters as plain ones, and no invisible characters. */
function simplified(text) {
  return text.normalize("NFKC").replace(/[\p{Cf}\p{Cc}]/gu, (character) => (/\s/.test(character) ? character : ""));
}

function escaped(part) {
  return part.replace(/[\\^$.*+?()[\]{}|/]/gu, "\\$&");
}
