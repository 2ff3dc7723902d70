// Text <-> token ids, as SentencePiece's BPE does it for data/tiny/tokenizer.model.
//
// A text begins as characters. Again and again the two neighbours that together make the best piece
// are joined. The pieces are sorted: of two, that with the lower id is the better.
"use strict";

const SPACE = "\u2581";              // how SentencePiece writes a space
const BYTE = /^<0x([0-9A-F]{2})>$/;  // a piece that is one byte of a character without a piece

class Tokenizer {
  constructor(pieces, bos) {
    this.pieces = pieces;
    this.bos = bos;
    this.ids = new Map(pieces.map((piece, id) => [piece, id]));
    this.firstByte = this.ids.get("<0x00>");
  }

  // The ids of a text; of a long one the first `most`, and some more. No piece is longer than 16
  // characters.
  encode(text, most = Infinity) {
    const ids = [];
    if (text.length > 16 * (most + 64)) text = text.slice(0, 16 * (most + 64));
    for (const part of this.parts(text)) {
      for (const id of this.encodePart(part)) ids.push(id);
      if (ids.length >= most) break;
    }
    return ids;
  }

  // No piece goes on past a space, so that a text may be cut in front of single spaces. A literal
  // SPACE stands alone: it is a character without a piece.
  parts(text) {
    const parts = [];
    let start = 0;
    for (let i = 1; i < text.length; i++) {
      const single = text[i] === " " && text[i - 1] !== " " && text[i + 1] !== " ";
      const literal = text[i] === SPACE || text[i - 1] === SPACE;
      if (!single && !literal) continue;
      parts.push(text.slice(start, i));
      start = i;
    }
    return [...parts, text.slice(start)];
  }

  encodePart(text) {
    if (text === SPACE) return this.bytesOf(text);
    const symbols = Array.from(text, character => character === " " ? SPACE : character);
    for (;;) {
      let best = Infinity;
      let at = -1;
      for (let i = 0; i + 1 < symbols.length; i++) {
        const id = this.ids.get(symbols[i] + symbols[i + 1]) ?? Infinity;
        if (id < best) [best, at] = [id, i];
      }
      if (at < 0) break;
      symbols.splice(at, 2, symbols[at] + symbols[at + 1]);
    }
    return symbols.flatMap(symbol => this.ids.get(symbol) ?? this.bytesOf(symbol));
  }

  // The ids of a character's UTF-8 bytes.
  bytesOf(character) {
    return Array.from(new TextEncoder().encode(character), byte => this.firstByte + byte);
  }

  // The text of ids. BOS and EOS are silent, incomplete characters become U+FFFD.
  decode(ids) {
    const bytes = ids.flatMap(id => {
      const piece = this.pieces[id];
      const byte = BYTE.exec(piece);
      if (byte) return parseInt(byte[1], 16);
      if (id < this.firstByte) return [];
      return Array.from(new TextEncoder().encode(piece.replaceAll(SPACE, " ")));
    });
    return new TextDecoder().decode(new Uint8Array(bytes));
  }
}
