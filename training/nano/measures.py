"""Numbers that only the words beside them tell apart: 20 kWh at station 882, 5000 at 3.5 percent for 4 years."""

from __future__ import annotations

from typing import Any

from training.nano.examples import Source
from training.nano.tasks import property_schema, put_among, quoted
from training.nano.values import value

# (names of the parameter, kinds of its value, what it is counted in, ways to say it). No way is part of another
# row's, so that several of them in one request are told apart.
MEASURES = (
    ("rate|interest_rate|interest|annual_rate|apr", "small float", "percent", " at {v} percent interest /  at {v}% a year /  with an interest of {v} percent / , {v}% interest"),
    ("discount|discount_percent|percent_off|reduction", "small minutes", "percent", " with {v} percent off / , {v}% off /  with a discount of {v}% / , {v} percent less"),
    ("tax_rate|vat|tax_percent|tax", "small float", "percent", " with {v}% tax / , {v} percent VAT /  plus {v}% tax /  with a tax of {v} percent"),
    ("brightness|level|intensity|volume|opacity", "minutes", "percent", " to {v} percent /  to {v}% / , up to {v}%"),
    ("years|term|term_years|duration_years|period", "small integer", "years", " for {v} years / , over {v} years / , {v} years / , {v} years long"),
    ("months|term_months|duration_months", "small integer", "months", " for {v} months / , {v} months / , in {v} months"),
    ("weeks|duration_weeks|num_weeks", "small", "weeks", " for {v} weeks / , {v} weeks /  over {v} weeks"),
    ("days|num_days|duration_days|duration|number_of_days", "small integer", "days", " for {v} days / , {v} days /  for the next {v} days /  of the last {v} days"),
    ("nights|num_nights|stay_nights", "small", "nights", " for {v} nights / , {v} nights"),
    ("hours|duration|duration_hours|time_hours", "small float", "hours", " for {v} hours / , {v} hours / , it takes {v} hours"),
    ("minutes|duration|duration_minutes|time|length", "minutes", "minutes", " for {v} minutes / , {v} minutes / , {v} min /  in {v} minutes"),
    ("seconds|delay|timeout|interval|delay_seconds", "minutes integer", "seconds", " after {v} seconds / , {v} seconds /  every {v} seconds /  for {v} s"),
    ("weight|weight_kg|kg|mass", "integer float", "kilograms", " of {v} kg / , {v} kilos / , weighing {v} kg /  that weighs {v} kilograms / , it weighs {v} kg"),
    ("grams|portion|weight_g|amount_g", "integer", "grams", " of {v} grams / , {v} g / , {v} grams"),
    ("height|height_cm|body_height", "integer float", "centimeters", " , {v} cm tall / , {v} cm high /  with a height of {v} cm /  that is {v} cm tall"),
    ("distance|distance_km|km|kilometers|radius", "integer float", "kilometers", " over {v} km /  within {v} kilometers / , {v} km / , {v} km away /  in {v} km"),
    ("miles|distance_miles|mileage|radius_miles", "integer float", "miles", " within {v} miles / , {v} miles /  over {v} miles"),
    ("meters|depth|length_m|distance_m", "integer float", "meters", " of {v} meters / , {v} meters / , {v} m deep / , {v} m long"),
    ("age|age_years|patient_age|user_age|child_age", "small integer", "", " who is {v} years old / , aged {v} / , age {v} / I am {v} years old. | /  for a {v} year old"),
    ("temperature|degrees|target_temperature|temp", "integer float", "degrees", " at {v} degrees /  to {v} degrees / , {v} degrees / , {v}°C"),
    ("people|guests|party_size|persons|num_people|travelers|passengers|servings", "small", "", " for {v} people / , {v} people / , we are {v} / , {v} persons / , a party of {v}"),
    ("adults|num_adults", "small", "", " for {v} adults / , {v} adults"),
    ("children|kids|num_children", "small", "", " and {v} children / , {v} kids /  with {v} children"),
    ("rooms|bedrooms|num_rooms|number_of_rooms", "small", "", " with {v} rooms / , {v} bedrooms / , {v} rooms"),
    ("energy|kwh|energy_kwh|amount_kwh", "integer float", "kWh", " with {v} kWh / , {v} kWh /  of {v} kWh"),
    ("power|watts|power_w|max_power", "integer", "watts", " with {v} watts / , {v} W / , {v} watts"),
    ("speed|speed_kmh|max_speed|velocity", "integer", "km/h", " at {v} km/h / , {v} km/h /  with a speed of {v}"),
    ("calories|max_calories|kcal", "integer", "kcal", " with {v} calories / , {v} kcal /  under {v} calories"),
    ("liters|volume|amount_l|fuel", "integer float", "liters", " of {v} liters / , {v} liters / , {v} l"),
    ("pages|num_pages|page_count", "small integer", "", " with {v} pages / , {v} pages long / , {v} pages"),
    ("page|page_number", "small integer", "", " on page {v} / , page {v} /  from page {v}"),
    ("copies|num_copies|count", "small integer", "", " in {v} copies / , {v} copies / , {v} times"),
    ("season|season_number", "small", "", " in season {v} / , season {v} /  of season {v}"),
    ("episode|episode_number|part", "small integer", "", " , episode {v} /  of episode {v}"),
    ("chapter|chapter_number|section", "small", "", " , chapter {v} /  in chapter {v} /  of chapter {v}"),
    ("floor|level|floor_number", "small", "", " on floor {v} /  on the floor {v} / , floor {v}"),
    ("room|room_number|room_id", "code", "", " in room {v} / , room {v} /  for room {v} /  to room {v}"),
    ("table|table_number|table_id", "small code", "", " at table {v} / , table {v} /  for table {v}"),
    ("gate|gate_number|gate_id", "code", "", " at gate {v} / , gate {v} /  to gate {v}"),
    ("station|station_id|station_number", "code", "", " at station {v} / , station {v} /  from station {v}"),
    ("seat|seat_number|seat_id", "seat code", "", " in seat {v} / , seat {v} /  on seat {v}"),
    ("line|line_number|row|row_number", "small integer", "", " in line {v} / , line {v} /  on line {v}"),
    ("port|port_number", "integer", "", " on port {v} / , port {v} /  at port {v}"),
    ("stars|rating|min_stars|score", "small", "stars", " with {v} stars / , {v} stars /  {v} out of 5"),
    ("price|max_price|budget|amount|cost|principal|balance|salary|income", "integer thousands", "dollars", " for {v} dollars /  of ${v} / , {v} dollars / , ${v} /  with a budget of {v} dollars"),
    ("top_k|k|limit|top|max_results|num_results", "small integer", "", " , top {v} / , only {v} results / , at most {v} results / , limit {v}"),
    ("quantity|pieces|units|number_of_items", "small integer", "", " , {v} pieces / , {v} of them / , quantity {v} / , {v} units"),
    ("step|steps|num_steps", "small integer", "", " in {v} steps / , {v} steps /  with {v} steps"),
    ("dpi|resolution|quality|width_px", "integer", "", " at {v} dpi /  with {v} dpi / , {v} dpi"),
    ("hour|at_hour|start_hour", "small", "", " at {v} o'clock / , {v} o'clock"),
)  # fmt: skip
VAGUE = ("price", "top_k", "quantity", "copies", "step")  # what another number might be meant by
MODIFYING = frozenset(("num", "number", "max", "min", "of", "id", "start", "end", "target", "user", "to", "from"))
SPOKEN_UNIT = 0.4  # of the parameters counted in something say so


def measured(s: Source) -> tuple[str, str, str]:
    """A number's (names, kind, ways to say it)."""
    names, kinds, _, ways = s.rng.choice(MEASURES)
    return names, s.pick(*kinds.split()), ways


def said_measured(s: Source, ask: str, properties: dict[str, Any], arguments: dict[str, Any]) -> str:
    """Adds up to three numbers, and sometimes one that the request does not give. -> the request that says them."""
    front, behind = "", ask
    given = s.rng.choices((1, 2, 3), (1, 4, 3))[0]
    for names, kinds, unit, ways in _apart(s, given, properties):
        kind = s.pick(*kinds.split())
        made = value(s, kind)
        key = s.pick(*names.split("|"))
        properties[key] = _schema(s, key, kind, unit, made)
        arguments[key] = made
        way = s.pick(*ways.split(" / ")).replace(" ,", ",")
        text = way.rstrip("|").format(v=quoted(s, kind, made))
        if way.endswith("|"):
            front += text
        elif behind == ask or text.startswith(",") or s.maybe(0.7):
            behind += text
        else:
            behind += f" and{text}"
    if s.maybe(0.5):
        leave_unmeasured(s, properties)
    return front + behind


def leave_unmeasured(s: Source, properties: dict[str, Any]) -> None:
    """Adds a number that the request does not give: its name says what it counts, and nothing else there counts
    that."""
    for names, kinds, unit, _ in _apart(s, 1, properties):
        if (key := names.split("|")[0]) not in VAGUE:
            kind = s.pick(*kinds.split())
            put_among(s, properties, key, _schema(s, key, kind, unit, value(s, kind)))


def _apart(s: Source, count: int, properties: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Up to so many rows of which none has a word for its name that another, or a parameter that there is, has."""
    taken = {part for key in properties for part in key.split("_")}
    rows = []
    for row in s.rng.sample(MEASURES, count):
        names = row[0].split("|")
        parts = {part for name in names for part in name.split("_")} - MODIFYING
        if parts.isdisjoint(taken) and properties.keys().isdisjoint(names):
            rows.append(row)
            taken |= parts
    return rows


def _schema(s: Source, key: str, kind: str, unit: str, made: Any) -> dict[str, Any]:
    schema = property_schema(s, key, kind, made)
    if unit and s.maybe(SPOKEN_UNIT):
        spoken = key.replace("_", " ")
        schema["description"] = s.pick(f"In {unit}", f"{spoken.capitalize()} in {unit}", f"The {spoken} ({unit})", f"{unit.capitalize()}.")  # fmt: skip
    return schema
