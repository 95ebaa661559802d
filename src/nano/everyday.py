"""Everyday tools, and the words in which people ask for them. Every fifth is held out of training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Archetype:
    """An everyday tool. {0}, {1} in an ask are the values of its parameters, in order."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[tuple[str, str], ...]  # (names that it may have, split by |; kind of value)
    asks: tuple[str, ...]
    results: tuple[str, ...]  # keys that its result may have


def _tool(names: str, descriptions: str, parameters: str, asks: str, results: str) -> Archetype:
    pairs = [p.split(":") for p in parameters.split()]
    return Archetype(
        tuple(names.split()), tuple(descriptions.split(" / ")), tuple((a, b) for a, b in pairs), tuple(asks.split(" / ")), tuple(results.split()),
    )  # fmt: skip


ARCHETYPES = (
    _tool("get_weather weather get_current_weather weather_lookup", "Get the current weather for a city. / Get the weather in a location. / Returns the weather.",
          "city|location|place:name", "What is the weather in {0}? / What's the weather like in {0}? / How is the weather in {0} today? / weather in {0} / Tell me the weather in {0}. / Is it raining in {0}?",
          "temperature condition humidity wind"),
    _tool("get_forecast weather_forecast", "Get the weather forecast for some days.", "city|location:name days:integer",
          "Give me the forecast for {0} for {1} days. / What is the {1} day forecast for {0}? / Forecast for {0}, {1} days", "forecast high low"),
    _tool("get_time current_time get_local_time time_in", "Get the current time in a city. / Returns the local time in a time zone.", "city|timezone|location:name",
          "What time is it in {0}? / What's the time in {0}? / Tell me the time in {0}. / current time in {0}", "time hour timezone"),
    _tool("send_email send_mail email_send", "Send an email to a person. / Sends an email.", "to|recipient:name subject|text|message|body:phrase",
          "Send an email to {0} about {1}. / Email {0}: {1} / Write an email to {0} saying {1}. / Mail {0} about {1}", "status id"),
    _tool("send_message send_text send_sms", "Send a text message. / Send a message to a contact.", "to|contact|recipient:name text|message|body:phrase",
          "Send a message to {0}: {1} / Text {0} {1} / Tell {0} that {1} / Message {0}: {1}", "status delivered"),
    _tool("search web_search search_web google", "Search the web. / Search the internet for a query.", "query|q|text:phrase",
          "Search for {0}. / Search the web for {0} / Look up {0} on the web. / Google {0} / Find {0} online.", "title url results"),
    _tool("get_stock_price stock_price get_quote", "Get the price of a stock. / Returns the current stock price of a company.", "company|symbol|ticker:name",
          "What is the stock price of {0}? / How much is a share of {0}? / Stock price of {0} / What's the price of {0} stock?", "price currency change"),
    _tool("convert_currency currency_convert exchange", "Convert money from one currency to another.", "amount:integer from|source|from_currency:currency to|target|to_currency:currency",
          "Convert {0} {1} to {2}. / How much is {0} {1} in {2}? / Change {0} {1} into {2} / What is {0} {1} in {2}?", "result rate amount"),
    _tool("create_event add_event schedule_meeting calendar_add", "Create a calendar event. / Schedule a meeting.", "title|name|topic:phrase day|date:day",
          "Schedule a meeting about {0} on {1}. / Create an event {0} on {1}. / Put {0} in my calendar for {1} / Add {0} to my calendar on {1}.", "event_id status"),
    _tool("set_alarm alarm create_alarm", "Set an alarm. / Set an alarm clock.", "hour|time:integer",
          "Set an alarm for {0}. / Wake me up at {0}. / Set my alarm to {0} / I need an alarm at {0}", "status alarm_id"),
    _tool("set_timer start_timer timer", "Start a timer for some minutes.", "minutes|duration:integer",
          "Set a timer for {0} minutes. / Start a {0} minute timer. / Timer for {0} minutes", "status timer_id"),
    _tool("play_music play_song music_player", "Play a song. / Play music by an artist.", "song|artist|title|track:name",
          "Play {0}. / Play some music by {0}. / Put on {0} / I want to hear {0}. / Play the song {0}", "playing status"),
    _tool("translate translate_text translator", "Translate text into another language.", "text|phrase:phrase language|target|target_language:language",
          "Translate {0} into {1}. / Translate {0} to {1} / How do you say {0} in {1}? / What is {0} in {1}?", "translation text"),
    _tool("turn_on_light light_on switch_light", "Turn on the light in a room.", "room|location:room",
          "Turn on the light in the {0}. / Lights on in the {0} / Switch on the {0} light. / Make it bright in the {0}", "status room"),
    _tool("set_temperature set_thermostat thermostat", "Set the temperature of the heating. / Set the thermostat.", "temperature|degrees|value:integer",
          "Set the temperature to {0} degrees. / Set the heating to {0}. / Make it {0} degrees / Thermostat to {0}", "status temperature"),
    _tool("get_order order_status lookup_order track_order", "Look up an order by its number. / Get the status of an order.", "order_id|id|order|number:integer",
          "Where is my order {0}? / What is the status of order {0}? / Track order {0} / Look up order number {0}.", "status carrier eta"),
    _tool("book_flight flight_booking find_flights search_flights", "Book a flight between two cities. / Find flights.", "from|origin|departure:name to|destination:name",
          "Book a flight from {0} to {1}. / I want to fly from {0} to {1}. / Find flights from {0} to {1} / Flights from {0} to {1}?", "flight price departure"),
    _tool("book_hotel find_hotel hotel_search", "Book a hotel in a city for some nights.", "city|location:name nights:integer",
          "Book a hotel in {0} for {1} nights. / Find a hotel in {0} for {1} nights. / I need a hotel in {0}, {1} nights", "hotel price stars"),
    _tool("find_restaurant restaurant_search get_restaurants", "Find a restaurant in a city.", "city|location:name food|cuisine:word",
          "Find a restaurant in {0} with {1} food. / Where can I eat {1} in {0}? / Restaurants in {0} with {1}", "name rating address"),
    _tool("add_reminder remind create_reminder set_reminder", "Create a reminder. / Remind the user of something.", "text|task|reminder:phrase",
          "Remind me to {0}. / Set a reminder to {0} / Don't let me forget to {0}. / Add a reminder: {0}", "status reminder_id"),
    _tool("add_todo create_task add_task todo_add", "Add a task to the todo list.", "task|title|item:phrase",
          "Add {0} to my todo list. / New task: {0} / Put {0} on my list of tasks / Create a task {0}", "task_id status"),
    _tool("get_distance distance route_distance", "Get the distance between two places.", "from|start|origin:name to|end|destination:name",
          "How far is it from {0} to {1}? / What is the distance from {0} to {1}? / Distance between {0} and {1}", "distance kilometers miles"),
    _tool("get_news news latest_news", "Get the latest news about a topic.", "topic|subject|query:word",
          "What is the news about {0}? / Give me the latest news on {0}. / News about {0} / Any news on {0}?", "headline source"),
    _tool("get_recipe recipe find_recipe", "Find a recipe for a dish.", "dish|food|name:word",
          "Give me a recipe for {0}. / How do I cook {0}? / Find a recipe for {0} / I want to cook {0}.", "recipe minutes ingredients"),
    _tool("add calculator_add add_numbers sum", "Add two numbers.", "a|x|first:integer b|y|second:integer",
          "Add {0} and {1}. / What is {0} plus {1}? / What is {0} + {1}? / Sum {0} and {1}", "result sum"),
    _tool("multiply calculator_multiply product", "Multiply two numbers.", "a|x|first:integer b|y|second:integer",
          "Multiply {0} and {1}. / What is {0} times {1}? / What is {0} * {1}?", "result product"),
    _tool("get_population population", "Get the population of a city or country.", "place|country|city:name",
          "What is the population of {0}? / How many people live in {0}? / population of {0}", "population year"),
    _tool("get_capital capital_of", "Get the capital of a country.", "country:name",
          "What is the capital of {0}? / Capital of {0}? / Tell me the capital of {0}.", "capital"),
    _tool("find_user get_user lookup_user user_info", "Look up a user by name. / Get information about a user.", "name|user|username:name",
          "Look up the user {0}. / Find user {0} / Who is the user {0}? / Get me the data of user {0}.", "email id role"),
    _tool("delete_file remove_file", "Delete a file.", "path|file|filename|name:file", "Delete the file {0}. / Remove {0} / Please delete {0}. / Erase the file {0}", "status deleted"),
    _tool("read_file open_file cat_file", "Read a file. / Read the contents of a file.", "path|file|filename:file",
          "Read the file {0}. / What is in {0}? / Show me the file {0} / Open {0}", "content size"),
    _tool("call_phone phone_call make_call dial", "Call a person on the phone.", "contact|name|person:name", "Call {0}. / Phone {0} / Give {0} a call. / Ring {0}", "status"),
    _tool("order_food order_pizza place_order", "Order food.", "item|dish|food:word quantity|count|amount:integer",
          "Order {1} {0}. / I want to order {1} {0}. / Get me {1} {0} / Please order {1} {0} for dinner", "order_id price eta"),
    _tool("define dictionary get_definition lookup_word", "Look up the definition of a word in the dictionary.", "word|term:word",
          "What does {0} mean? / Define {0}. / What is the definition of {0}? / Look up {0} in the dictionary", "definition"),
    _tool("roll_dice dice throw_dice", "Roll dice.", "sides|count:integer", "Roll a die with {0} sides. / Roll a {0} sided die / Throw a die with {0} sides", "value result"),
    _tool("lock_door lock door_lock", "Lock a door.", "door|room:room", "Lock the {0} door. / Lock the door of the {0} / Please lock the {0}", "status locked"),
    _tool("get_traffic traffic traffic_info", "Get traffic information for a road or city.", "city|road|location:name",
          "How is the traffic in {0}? / Traffic in {0}? / Is there a traffic jam in {0}?", "delay status"),
    _tool("buy_ticket book_ticket get_tickets", "Buy tickets for an event.", "event|show|name:name count|quantity|tickets:integer",
          "Buy {1} tickets for {0}. / I want {1} tickets for {0}. / Get {1} tickets for {0}", "price seat status"),
    _tool("rent_car book_car car_rental", "Rent a car in a city for some days.", "city|location:name days:integer",
          "Rent a car in {0} for {1} days. / I need a car in {0} for {1} days.", "car price"),
    _tool("get_balance account_balance check_balance", "Get the balance of a bank account.", "account|account_id|number:integer",
          "What is the balance of account {0}? / How much money is in account {0}? / Check account {0}", "balance currency"),
)  # fmt: skip
LANGUAGES = [
    "French",
    "German",
    "Spanish",
    "Italian",
    "Japanese",
    "Arabic",
    "Hindi",
    "Dutch",
    "Greek",
    "Polish",
    "Turkish",
    "Swedish",
]
CURRENCIES = [
    "USD",
    "EUR",
    "GBP",
    "JPY",
    "CHF",
    "dollars",
    "euros",
    "pounds",
    "yen",
    "francs",
    "CAD",
    "AUD",
]
ROOMS = ["kitchen", "bathroom", "bedroom", "garage", "office", "hall", "garden", "cellar", "attic"]
DAYS = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "tomorrow",
    "today",
]
