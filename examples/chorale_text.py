"""Bach's four-part chorales as tokens, a sixteenth note a step, and back.

A voice's token at a step: its pitch where a note begins, HOLD where it goes on, REST; EDGE before
the first step and after the last one. The chorales are those of Riemenschneider's edition, from
music21's corpus; those not in four voices are left out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HOLD, REST, EDGE, FIRST = 0, 1, 2, 3
LOWEST, HIGHEST = 30, 90  # MIDI pitches; a chorale keeps within 36..81
TOKENS = FIRST + HIGHEST - LOWEST + 1
VOICES = ("Soprano", "Alto", "Tenor", "Bass")
STEPS_PER_QUARTER = 4
SHIFTS = range(-5, 7)  # semitones: every key once


@dataclass(frozen=True)
class Chorale:
    title: str
    tokens: Tensor  # (T, 4)


def read_chorale(score, title: str) -> Chorale | None:
    """None unless it has the four voices, on a grid of sixteenths."""
    if [part.partName for part in score.parts] != list(VOICES):
        return None
    voices = []
    for part in score.parts:
        steps: list[int] = []
        for note in part.flatten().notesAndRests:
            begin, length = (
                float(x) * STEPS_PER_QUARTER for x in (note.offset, note.quarterLength)
            )
            if length == 0:  # a grace note
                continue
            if begin != int(begin) or length != int(length):
                return None
            steps += [REST] * (int(begin) - len(steps))
            if len(steps) != int(begin):  # two notes at once
                return None
            goes_on = note.tie is not None and note.tie.type != "start"
            first = REST if note.isRest else HOLD if goes_on else note.pitch.midi - LOWEST + FIRST
            steps += [first, *[REST if note.isRest else HOLD] * (int(length) - 1)]
        voices.append(steps)
    longest = max(map(len, voices))
    rows = [steps + [REST] * (longest - len(steps)) for steps in voices]
    return Chorale(title, torch.tensor(rows).T.contiguous())


def load(count: int, seed: int, progress) -> tuple[list[Chorale], list[Chorale]]:
    """Chorales to learn from and held-out ones, a tenth of the hymns: Bach set some tunes several
    times, and none of a held-out hymn is learnt from."""
    from music21 import corpus
    from music21.corpus import chorales

    listed = chorales.ChoraleListRKBWV().byRiemenschneider
    works = {str(entry["bwv"]): entry["title"] for entry in listed.values()}  # printed twice: once
    found = []
    for bwv, title in progress(list(works.items())[:count]):
        chorale = read_chorale(corpus.parse(f"bwv{bwv}"), title)
        if chorale is not None:
            found.append(chorale)
    titles = sorted({chorale.title for chorale in found})
    held = set(random.Random(seed).sample(titles, max(1, len(titles) // 10)))
    train = [c for c in found if c.title not in held]
    return train, [c for c in found if c.title in held]


def transposed(tokens: Tensor, semitones: int) -> Tensor:
    return torch.where(tokens >= FIRST, tokens + semitones, tokens)


@dataclass(frozen=True)
class Batch:
    given: Tensor  # (B, T, 4): EDGE, then the chorale
    wanted: Tensor  # (B, T, 4): the chorale, then EDGE
    lengths: Tensor  # (B,)


def batch_of(chorales: list[Tensor]) -> Batch:
    edge = torch.full((1, len(VOICES)), EDGE)
    rows = [torch.cat([edge, tokens, edge]) for tokens in chorales]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=EDGE)
    lengths = torch.tensor([len(row) - 1 for row in rows])
    return Batch(padded[:, :-1], padded[:, 1:], lengths)


def notes_of(voice: list[int]) -> list[tuple[int, int, int | None]]:
    """(first step, steps, MIDI pitch or None for a rest) of a voice's notes."""
    notes: list[tuple[int, int, int | None]] = []
    for step, token in enumerate(voice):
        pitch = token - FIRST + LOWEST if token >= FIRST else None
        goes_on = token == HOLD or (token < FIRST and notes and notes[-1][2] is None)
        if goes_on and notes:
            begin, length, before = notes[-1]
            notes[-1] = (begin, length + 1, before)
        else:
            notes.append((step, 1, pitch))
    return notes


def write(tokens: Tensor, folder: Path, name: str) -> list[Path]:
    """NAME.mid and NAME.musicxml of a chorale (T, 4)."""
    from music21 import clef, meter, note, stream

    score = stream.Score()
    for index, voice in enumerate(VOICES):
        part = stream.Part(id=voice)
        part.partName = voice
        part.append(clef.BassClef() if voice in ("Tenor", "Bass") else clef.TrebleClef())
        part.append(meter.TimeSignature("4/4"))
        for _, steps, pitch in notes_of(tokens[:, index].tolist()):
            length = steps / STEPS_PER_QUARTER
            sound = note.Rest() if pitch is None else note.Note(pitch)
            sound.quarterLength = length
            part.append(sound)
        score.insert(0, part)
    paths = [folder / f"{name}.mid", folder / f"{name}.musicxml"]
    score.write("midi", fp=paths[0])
    score.write("musicxml", fp=paths[1])
    return paths
