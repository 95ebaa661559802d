"""Tools that switch something: which of two states is meant, the request's verb tells and no word of the tool."""

from __future__ import annotations

from typing import Any

from training.nano.examples import Source
from training.nano.tasks import (
    Task,
    add_unasked,
    definition,
    property_schema,
    quoted,
    reordered,
    required_of,
    spoken,
    styled_name,
)
from training.nano.values import some_thing, value

# state: (words for it in names, ways to ask for it, ways to ask for its contrary; {n} what is switched)
SWITCHES: dict[str, tuple[str, str, str]] = {
    "locked": ("locked lock", "Lock {n} / Please lock {n} / {n} must be locked / Nobody may open {n}", "Unlock {n} / Open the lock of {n} / Please unlock {n} / I want to open {n}, unlock it"),
    "enabled": ("enabled active", "Enable {n} / Activate {n} / Switch {n} on / {n} should work again", "Disable {n} / Deactivate {n} / Switch {n} off / {n} should not work any more"),
    "on": ("on power power_on", "Turn on {n} / Turn {n} on / Switch on {n} / Power {n} up / {n} on please", "Turn off {n} / Turn {n} off / Switch off {n} / Power {n} down / {n} off please"),
    "open": ("open opened", "Open {n} / {n} should be open / Please open {n}", "Close {n} / Shut {n} / {n} should be closed"),
    "muted": ("muted mute silent", "Mute {n} / Silence {n} / I don't want to hear {n} / {n} is too loud, mute it", "Unmute {n} / Let me hear {n} again / Take {n} off mute"),
    "visible": ("visible shown show", "Show {n} / Make {n} visible / Everybody should see {n} / Let {n} appear", "Hide {n} / Make {n} invisible / Nobody should see {n} / Let {n} disappear"),
    "public": ("public is_public published", "Make {n} public / Publish {n} / Everybody may see {n}", "Make {n} private / Take {n} offline / Only I may see {n}"),
    "paused": ("paused pause", "Pause {n} / Hold {n} for a while / Interrupt {n}", "Resume {n} / Go on with {n} / Continue {n}"),
    "pinned": ("pinned pin", "Pin {n} / Keep {n} at the top", "Unpin {n} / {n} need not be at the top any more"),
    "archived": ("archived archive", "Archive {n} / Put {n} into the archive", "Unarchive {n} / Take {n} out of the archive / Restore {n} from the archive"),
    "subscribed": ("subscribed subscribe", "Subscribe me to {n} / I want to get {n} / Sign me up for {n}", "Unsubscribe me from {n} / I don't want {n} any more / Take me off {n}"),
    "connected": ("connected connect", "Connect {n} / Link {n} / Plug {n} in", "Disconnect {n} / Unlink {n} / Cut {n} off"),
    "favorite": ("favorite is_favorite starred", "Add {n} to my favorites / Star {n} / I like {n}, remember it", "Remove {n} from my favorites / Unstar {n} / {n} is no favorite any more"),
    "read": ("read is_read seen", "Mark {n} as read / I have read {n} / I have seen {n}", "Mark {n} as unread / I have not read {n} yet"),
    "done": ("done completed finished", "Mark {n} as done / {n} is done / I have finished {n} / Tick off {n}", "Reopen {n} / {n} is not done yet / Mark {n} as not done"),
    "allowed": ("allowed allow permit", "Allow {n} / Let {n} in / {n} may pass / Permit {n}", "Forbid {n} / Block {n} / Don't let {n} in / {n} may not pass"),
    "encrypted": ("encrypted encrypt secure", "Encrypt {n} / Make {n} secure", "Decrypt {n} / Remove the encryption of {n}"),
    "attached": ("attached attach", "Attach {n} / Fix {n} to it", "Detach {n} / Take {n} off"),
}  # fmt: skip
KINDS = ("code", "slug", "name", "word", "item", "title", "room", "appliance", "ip", "file", "username")  # fmt: skip
ABOUT = ("Sets whether a {x} is {a}.", "Change the {a} state of a {x}", "Whether the {x} is {a}", "Switches a {x} between {a} and not.", "{A} or not")  # fmt: skip
TELL = ("true or false", "True for {a}", "Whether it is {a}", "{A}?", "")


def switched(s: Source) -> Task:
    """A tool that sets one state of a thing to true or false."""
    state = s.rng.choice(list(SWITCHES))
    names, on, off = SWITCHES[state]
    thing = some_thing(s)
    word = s.pick(*names.split())
    name = s.pick(f"set_{thing}_{word}", f"set_{thing}_state", f"{thing}_switch", f"set_{thing}", f"{word}_{thing}", f"update_{thing}_{word}")  # fmt: skip
    kind = s.rng.choice((f"#{thing}", *KINDS))
    made, wanted = value(s, kind), s.maybe(0.5)
    key = s.pick(thing, f"{thing}_id", f"{thing}_name", "id", "name", "target")
    flag = s.pick(word, state, "value", "state")
    flag = "value" if flag == key else flag  # set_lock(lock, lock)
    text = quoted(s, kind, made)
    called = s.pick(text, f"the {thing} {text}", f"the {thing} {text}", f"{thing} {text}", f"my {thing} {text}")
    ask = s.pick(*(on if wanted else off).split(" / ")).format(n=called)
    schema: dict[str, Any] = {"type": "boolean"}
    if told := s.pick(*TELL).format(a=state, A=state.capitalize()):
        schema["description"] = told
    properties: dict[str, Any] = {key: property_schema(s, key, kind, made), flag: schema}
    properties, arguments = reordered(s, properties, {key: made, flag: wanted})
    required = required_of(s, arguments, 0.95)
    add_unasked(s, properties)
    told_by_name = word in name or flag in (word, state)
    about = s.pick(*ABOUT).format(a=state, A=state.capitalize(), x=thing)
    begins = ask[:1] == text[:1]
    return Task(
        definition(s, styled_name(s, name), about if s.maybe(0.85) or not told_by_name else "", properties, required),
        spoken(s, ask[:1].upper() + ask[1:] + s.pick(".", "", "") if not begins else ask, value_first=begins),
        arguments, (word, "status"),
    )  # fmt: skip
