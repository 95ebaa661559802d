"""Two values that people say together, from one to the other, one by the other, so many by so many; or one of the
two."""

from __future__ import annotations

from typing import Any

from training.nano.alike import alike
from training.nano.examples import Source
from training.nano.tasks import property_schema, quoted
from training.nano.values import email_of, some_thing, value

ALIKE = 0.4  # of pairs of one kind have values that share a part
# (names of the first parameter, of the second, kinds of both or of the one and the other, ways to say them); {x}, {y}:
# things
PAIRS = (
    ("from|source|from_{x}|old_{x}|current_{x}|origin|start_{x}|{x}_from|first_{x}", "to|target|to_{x}|new_{x}|destination|goal|end_{x}|{x}_to|second_{x}",
     "city city place file path word slug name code item person account version abbreviation abbreviation",
     " from {v} to {w} /  from {v} to {w} /  {v} to {w} /  to {w} from {v} / , {v} to {w} /  between {v} and {w} /  from {v} into {w} / : {v}, then {w} / , first {v}, then {w}"),
    ("old|old_{x}|old_value|search|current|before|what", "new|new_{x}|new_value|replacement|target|after|with", "word slug file name item code phrase email",
     " {v} to {w} /  {v} with {w} / , {w} in place of {v} /  {v} by {w} / : {v} becomes {w} /  with {w} instead of {v} / , not {v} but {w}"),
    ("start_date|from|from_date|check_in|begin|start|since|arrival", "end_date|to|to_date|check_out|end|until|departure", "date date day_or_date",
     " from {v} to {w} /  between {v} and {w} /  from {v} until {w} / , {v} to {w} /  starting {v} and ending {w} / , {v} - {w} / , start {v}, end {w} /  until {w}, from {v} on"),
    ("start_time|from|opens|begin|start", "end_time|to|closes|end|until", "time", " from {v} to {w} /  between {v} and {w} /  from {v} until {w} / , {v} to {w} / , {v} - {w}"),
    ("width|width_{x}|w|columns|length", "height|h|rows|depth|breadth", "integer",
     " to {v} by {w} / , {v}x{w} /  of {v} by {w} / , {v} wide and {w} high / , {w} high and {v} wide /  to {v}x{w} /  with a {k} of {v} and a {l} of {w} /  with a {l} of {w} and a {k} of {v} / , {k} {v}, {l} {w} / , {l} {w}, {k} {v}"),
    ("min_{x}|minimum|low|min|lower_limit|at_least", "max_{x}|maximum|high|max|upper_limit|at_most", "integer",
     " between {v} and {w} /  from {v} to {w} / , at least {v} and at most {w} / , over {v} and under {w} / , at most {w} and at least {v} / , {v} to {w} / , not under {v} and not over {w}"),
    ("sender|from_user|from|seller|giver|author|manager", "recipient|to_user|to|buyer|receiver|reader|employee", "person person email slug",
     " from {v} to {w} /  to {w} from {v} /  of {v} for {w} / , {v} to {w} /  for {w} from {v}"),
    ("title|name|song|book|work|track|{x}", "author|artist|by|creator|singer|writer|owner", "title+person",
     " {v} by {w} / , {v} by {w} /  of {w}: {v} /  by {w}, {v} / , the {k} is {v} and it is by {w} / : {w}, {v}"),
    ("task|item|text|message|what|{x}", "assignee|person|to|user|recipient|for|member", "phrase+person item+person",
     " {v} for {w} / : {v}, for {w} /  for {w}: {v} /  to {w}: {v} / , {w}: {v} /  {v} to {w}"),
    ("amount|price|value|total|sum", "currency|unit|money", "integer+currency float+currency thousands+currency",
     " for {v} {w} /  of {v} {w} /  over {v} {w} / , {v} {w} / , {v} in {w} /  in {w}, {v}"),
    ("username|user|login|name|account", "email|mail|address|contact", "username+email person+email word+email",
     " {v} with the email {w} / , {v}, {w} /  for {v} ({w}) / , {v} with {w} /  {w} for {v} / , name {v}, mail {w} / , mail {w}, name {v}"),
    ("project|repository|folder|list|channel|team|{x}", "summary|title|text|name|note|message", "slug+phrase word+phrase name+phrase",
     " in {v}: {w} /  in the {k} {v}: {w} /  in {v} with the {l} {w} /  in {v} called {w} / , {w}, in {v} /  called {w} in {v} /  for {v} saying {w}"),
    ("item|product|{x}|article", "quantity|count|amount|number|how_many", "item+small word+integer item+integer",
     ": {w} {v} /  with {w} {v} / , {w} of {v} /  for {w} {v} / , {v}, {w} times / , {v}: {w} / , {w} x {v}"),
    ("{x}|first_{x}|{x}_a|one|a|x", "{x}_b|second_{x}|other_{x}|another|b|y", "word name integer item person city float",
     " with {v} and {w} /  for {v} and {w} / : {v}, {w} / , {v} and {w} /  of {v} and {w} / , {v} or {w}"),
    ("size|weight|age|length|{x}", "height|speed|price|level|score", "integer integer small float",
     " with a {k} of {v} and a {l} of {w} /  with a {l} of {w} and a {k} of {v} / , {k} {v} and {l} {w} / , {l} {w} and {k} {v} / , {k}: {v}, {l}: {w} /  where {l} is {w} and {k} is {v}"),
    ("service|app|component|package", "version|release|tag", "slug+version word+version", " {v} version {w} /  {v} {w} /  version {w} of {v} / , {v} at {w} /  {w} of {v} / , {v}, version {w}"),
    ("user|username|account|person|{x}|name|id", "new_{x}|value|new_value|password|new_password|{x}_value|status|level", "person+word username+coupon slug+word word+slug code+word username+code name+integer",
     " of {v} to {w} /  for {v} to {w} / : {w} for {v} /  to {w} for {v} / , {v}: {w} /  of {v}: {w} / , for {v} it should be {w} / , {v} gets {w}"),
    ("lat|latitude|y|lat1|start_lat", "lon|longitude|x|lon1|lng|start_lon", "coordinate coordinate float", " at {v}, {w} /  {v}, {w} /  at {v} and {w} / : {v} {w} /  at {v} {w} /  for {k} {v} and {l} {w} / , {l} {w}, {k} {v}"),
    ("{x}s|num_{x}s|number_of_{x}s|{x}_count|{x}|max_{x}s", "{y}s|num_{y}s|number_of_{y}s|{y}_count|{y}|{y}_limit", "integer small integer+small small+integer",
     " with {v} {x}s and {w} {y}s /  of {v} {x}s and {w} {y}s /  for {v} {x}s, {w} {y}s /  with {w} {y}s and {v} {x}s / , {w} {y}s, {v} {x}s /  with {w} {y}s for {v} {x}s / , {v} {x}s with {w} {y}s each"),
    ("name|person|patient|{x}|customer|{x}_name", "birth_date|born|birthday|date_of_birth|dob|birthdate", "person+date", " {v}, born {w} /  of {v}, born {w} /  for {v}, born on {w} /  for {v} ({w}) / , {v}, {l} {w} /  for {v}, {l} {w} / , born {w}, called {v}"),
    ("name|person|candidate|user|employee|member|{x}_name", "role|position|job|title|team|department|{x}", "person+short_phrase name+word person+item", " {v} as {w} /  {v} for the {l} {w} /  of {v} as {w} / , {v}, {l} {w} /  with {v} for {w} /  for {v} in {w} /  for the {l} {w} with {v}"),
    ("owner|user|organization|org|account", "repo|repository|project|package|{x}", "word slug username+slug word+slug word", " {v}/{w} /  {w} of {v} /  of {v}/{w} /  {w} by {v} /  for {v}/{w} / , {k} {v}, {l} {w} /  for the {l} {w} of {v}"),
    ("treatment|service|activity|course|{x}|{x}_type|product|{x}_name", "date|day|when|time", "short_phrase+day_or_date word+day_or_date item+time short_phrase+date", " {v} on {w} /  {v} for {w} /  {w} {v} / , {v}, {w} /  for {v} on {w} /  on {w} for {v} / : {v} {w}"),
    ("street|address|place|road", "city|town|location", "address+city", " at {v} in {w} / , {v}, {w} /  in {w}, {v} /  to {v}, {w} /  in {w} at {v}"),
    ("file|share|item|source|package|object|{x}|{x}_name|what", "path|mount_point|location|folder|host|target|server|{y}_path|place|on|at|{y}", "path slug word+path slug+path file+path word+slug slug+slug code+slug item+place",
     " {v} at {w} /  {v} on {w} /  {v} in {w} / : {v} under {w} /  {v} into {w} / , {v}, at {w} /  on {w} for {v} /  {v} to {w}"),
    ("front|question|term|key|word|{x}|name|left", "back|answer|definition|value|meaning|{y}|content|right", "word item name phrase short_phrase integer+word word+phrase",
     " with {v} on the {k} and {w} on the {l} / : {k} {v}, {l} {w} / , {l} {w}, {k} {v} /  with {v} as {k} and {w} as {l} / : {v}, {w} / : {v} = {w} /  {v} for {w} /  with the {k} {v} and the {l} {w} /  where {l} is {w} and {k} is {v} / : {k}: {v}, {l}: {w}"),
    ("start_second|start|from_second|begin|start_minute|start_page|from_line|first_{x}|{x}_start", "end_second|end|to_second|stop|end_minute|end_page|to_line|last_{x}|{x}_end", "small minutes integer",
     " from second {v} to second {w} /  from {v} to {w} /  from {x} {v} to {x} {w} / , {v} to {w} / , {x}s {v} to {w} /  from page {v} to {w} /  between second {v} and second {w} / , lines {v} to {w} / , {v}-{w}"),
    ("title|name|show|series|work|{x}|{x}_name", "season|episode|chapter|volume|part|{y}|{y}_number", "title+small name+small title+integer",
     " {v}, {l} {w} /  of {l} {w} of {v} / , {l} {w} of {v} / : {v} {l} {w} /  of {v}, {l} {w} /  for {l} {w} of {v} /  in {l} {w} of {v}"),
    ("title|name|label|{x}_name|{x}_title|subject", "deadline|date|due_date|location|city|place|day", "title+day_or_date short_phrase+day_or_date title+city title+day_or_date phrase+day_or_date",
     " {v} with the {l} {w} /  {v}, {l} {w} /  {v} for {w} / : {v}, {w} / , {v}, {l} {w} /  called {v}, {l}: {w} /  {v} with {l} {w}"),
    ("type|record_type|kind|{x}_type|method|format|{x}", "value|content|data|{y}|target|text", "abbreviation+ip abbreviation+code abbreviation+word abbreviation+slug abbreviation+url",
     " {v} {w} / , {v}, {w} /  of type {v} with the {l} {w} /  {v} with the value {w} / : {v} {w} /  {w} as {v} / , {v} to {w} / , {v} pointing to {w}"),
    ("city|location|place", "date|day|when", "city+day_or_date", " in {v} on {w} /  in {v} {w} /  on {w} in {v} /  for {v} on {w} / , {v}, {w}"),
    ("date|day|when", "time|hour|at|start", "day_or_date+time", " on {v} at {w} / , {v}, {w} /  at {w} on {v} /  for {v} at {w} / , {v} {w}"),
)  # fmt: skip

# of two such parameters only one is given: names of both, kinds, ways to say the first alone, the second alone
HALVES = (
    ("from|from_{x}|origin|source|start|departure|old_{x}", "to|to_{x}|destination|target|end|arrival|new_{x}", "city place word slug abbreviation code file",
     " from {v} / , starting at {v} / , leaving {v} / , out of {v}", " to {v} / , ending at {v} /  going to {v} /  into {v}"),
    ("start_date|from|from_date|check_in|since|start|after", "end_date|to|until|check_out|end|before", "date day_or_date",
     " from {v} on /  since {v} /  starting {v} /  after {v} / , not before {v}", " until {v} /  before {v} / , ending {v} / , up to {v}"),
    ("start_time|from|start|begin|opens", "end_time|to|until|end|closes", "time", " from {v} on /  starting at {v} /  after {v}", " until {v} /  before {v} / , ending at {v}"),
    ("min_{x}|minimum|min|min_price|lower", "max_{x}|maximum|max|max_price|upper", "integer",
     " over {v} / , at least {v} /  with more than {v} / , {v} or more / , not under {v}", " under {v} / , at most {v} /  with less than {v} /  up to {v} / , not over {v}"),
    ("sender|from_user|author|creator|by", "recipient|to|to_user|receiver|for", "person email username", " from {v} /  by {v} / , it is from {v}", " to {v} /  for {v} / , it goes to {v}"),
    ("title|name|{x}_name|label", "description|note|notes|message|comment|body|details", "phrase title item", " called {v} /  named {v} /  with the name {v} /  titled {v}", " with the note {v} /  saying {v} /  with the text {v} /  that says {v}"),
    ("title|name|song|book|track|work|{x}", "artist|author|creator|singer|writer|by", "title+person name+person", " called {v} /  named {v} /  {v} / , {v}", " by {v} /  by {v} / , written by {v}"),
    ("task|title|item|text|what", "assignee|owner|person|for|member", "phrase+person item+person", ": {v} /  {v} /  called {v}", " for {v} / , {v} will do it / , assigned to {v}"),
    ("width|w|columns|width_{x}", "height|h|rows|height_{x}", "integer", ", {v} wide /  with a width of {v} / , {v} in width", ", {v} high /  with a height of {v} / , {v} in height"),
    ("{x}|{x}_name|{x}_id", "{y}|{y}_name|{y}_id", "word name code slug person abbreviation", " with the {x} {v} /  for the {x} {v} / , {x} {v} /  in the {x} {v} /  in the {v} {x}", " with the {y} {v} /  for the {y} {v} / , {y} {v} /  in the {y} {v} /  in the {v} {y}"),
    ("amount|price|total|value", "currency|money", "integer+currency float+currency", " for {v} /  over {v} /  of {v}", " in {v} / , currency {v}"),
    ("date|day|when", "time|hour|at", "day_or_date+time", " on {v} /  for {v} /  {v}", " at {v} / , {v}"),
)  # fmt: skip


def said_together(s: Source, ask: str, properties: dict[str, Any], arguments: dict[str, Any]) -> str:
    """Adds two parameters and their values. -> the request that says them behind what it said."""
    names, more_names, kinds, ways = s.rng.choice(PAIRS)
    thing, other_thing = some_thing(s), some_thing(s)
    names, more_names, ways = (
        text.replace("{x}", thing).replace("{y}", other_thing) for text in (names, more_names, ways)
    )
    first, second = s.pick(*names.split("|")), s.pick(*more_names.split("|"))
    if first == second or first in properties or second in properties:
        return ask
    kind, _, another = s.pick(*kinds.split()).partition("+")
    one = value(s, kind)
    other = _second(s, kind, another, one)
    for key, of_kind, made in ((first, kind, one), (second, another or kind, other)):
        properties[key] = property_schema(s, key, of_kind, made)
        arguments[key] = made
    said = s.pick(*ways.split(" / ")).format(
        v=quoted(s, kind, one), w=quoted(s, another or kind, other), k=first.replace("_", " "), l=second.replace("_", " ")
    )  # fmt: skip
    return ask + said


def said_alone(s: Source, ask: str, properties: dict[str, Any], arguments: dict[str, Any]) -> str:
    """Adds two parameters of which the request gives one. -> the request that says it behind what it said."""
    *names, kinds, first_ways, second_ways = s.rng.choice(HALVES)
    things = some_thing(s), some_thing(s)

    def filled(text: str) -> str:
        return text.replace("{x}", things[0]).replace("{y}", things[1])

    keys = [s.pick(*filled(text).split("|")) for text in names]
    if keys[0] == keys[1] or not properties.keys().isdisjoint(keys):
        return ask
    kind, _, another = s.pick(*kinds.split()).partition("+")
    of_kinds = kind, another or kind
    given = s.rng.randrange(2)
    made = value(s, of_kinds[given])
    for index in s.rng.sample((0, 1), 2):
        shown = made if index == given else value(s, of_kinds[index])
        properties[keys[index]] = property_schema(s, keys[index], of_kinds[index], shown)
    arguments[keys[given]] = made
    way = s.pick(*filled((first_ways, second_ways)[given]).split(" / "))
    return ask + way.format(v=quoted(s, of_kinds[given], made))


NAMED_KINDS = ("word", "name", "integer", "item", "code", "slug", "person", "short_phrase", "phrase", "file", "city", "day_or_date")  # fmt: skip
LISTS = (": {k} {v}", ", {k} {v}", "; {k}: {v}", " with {k} {v}", ", {k} = {v}", " where {k} is {v}", ". {K}: {v}", " with {v} as {k}", ", {v} as the {k}")  # fmt: skip


def said_by_name(s: Source, ask: str, properties: dict[str, Any], arguments: dict[str, Any]) -> str:
    """Adds two to four parameters of any names, and a value for each but one at most, said with their names in any
    order."""
    keys = [some_thing(s) for _ in range(s.number(2, 4))]
    keys = [f"{key}_{s.pick('name', 'value', 'id')}" if s.maybe(0.15) else key for key in keys]
    keys = [key for key in dict.fromkeys(keys) if key not in properties]
    unsaid = s.rng.choice(keys) if len(keys) > 2 and s.maybe(0.4) else None
    given = []
    for key in keys:
        kind = s.pick(*NAMED_KINDS)
        made = value(s, kind)
        properties[key] = property_schema(s, key, kind, made)
        if key != unsaid:
            arguments[key] = made
            given.append((key, quoted(s, kind, made)))
    s.rng.shuffle(given)
    way = s.pick(*LISTS)
    for index, (key, text) in enumerate(given):
        name = key.split("_")[0]
        said = way.format(k=name, K=name.capitalize(), v=text)
        if index and not way.startswith((".", ";")):
            said = s.pick(", ", ", ", " and ") + said.lstrip(" :,").removeprefix("with ").removeprefix("where ")
        ask += said
    return ask


def said_options(s: Source, ask: str, properties: dict[str, Any], arguments: dict[str, Any]) -> str:
    """Adds two enumerations of any words: which of them a word is of, is all that tells whose value it is."""
    words = list(dict.fromkeys(s.word() if s.maybe(0.5) else some_thing(s) for _ in range(8)))
    half = len(words) // 2
    said = []
    for options in (words[:half], words[half:]):
        key = s.pick("type", "mode", "style", "kind", "level", "target", "part", "method", "group", "position", "state", some_thing(s), some_thing(s))  # fmt: skip
        if key in properties or not options:
            continue
        schema: dict[str, Any] = {"type": "string", "enum": options}
        if s.maybe(0.3):
            schema["description"] = f"{s.pick('The', 'Which')} {key}"
        properties[key] = schema
        if s.maybe(0.85):
            arguments[key] = s.rng.choice(options)
            said.append(arguments[key])
    s.rng.shuffle(said)
    if not said:
        return ask
    if len(said) == 1:
        return ask + s.pick(" {}", ", {}", " in {}", " with {}", " as {}", " for {}s", " to {}").format(*said)
    return ask + s.pick(" {} {}", ", {}, {}", " {} to {}", " for {} with {}", ", {} and {}", " in {}, {}", " {} for {}s", " as {} {}", " {}, {} please").format(*said)  # fmt: skip


def _second(s: Source, kind: str, another: str, one: Any) -> Any:
    if another == "email" and s.maybe(0.5):
        return email_of(s, str(one))
    if another:
        made = value(s, another)
        return value(s, another) if made == one else made
    if s.maybe(ALIKE):
        return alike(s, kind, one)
    made = value(s, kind)
    return alike(s, kind, one) if made == one else made
