"""The question set: entities of three types, what is asked about each, and which answers count.

Answers are matched at the start of the completion, case and an article before them aside; ``|`` separates accepted ones. Names
in ``INVENTED`` belong to nothing: with the real entities of which the model knows nothing they are the unknown side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Kind = str

QUESTIONS: Mapping[Kind, Mapping[str, str]] = {
    "country": {
        "capital": "The capital of {} is",
        "continent": "The country of {} is on the continent of",
        "language": "The official language of {} is",
        "currency": "The currency of {} is the",
    },
    "city": {
        "country": "The government of {} is located in the country of",
        "language": "The language that most people in {} speak is",
        "continent": "The city of {} is on the continent of",
    },
    "person": {
        "occupation": "In history, {} was a famous",
        "country": "As we know, {} was born in the country of",
        "field": "Today, {} is best known for work in the field of",
    },
}
"""Type → attribute → the prompt that asks for it. No name comes first: position 0 is never edited."""

_COUNTRIES = """
France      | Paris | Europe | French | Euro
Germany     | Berlin | Europe | German | Euro;German mark
Italy       | Rome | Europe | Italian | Euro;Lira
Spain       | Madrid | Europe | Spanish | Euro;Peseta
Portugal    | Lisbon | Europe | Portuguese | Euro
Greece      | Athens | Europe | Greek | Euro
Norway      | Oslo | Europe;Northern Europe;Scandinavia | Norwegian | Norwegian krone;krone;Norwegian kroner
Sweden      | Stockholm | Europe;Northern Europe;Scandinavia | Swedish | Swedish krona;krona
Denmark     | Copenhagen | Europe;Northern Europe;Scandinavia | Danish | Danish krone;krone
Finland     | Helsinki | Europe;Northern Europe | Finnish | Euro
Poland      | Warsaw | Europe;Eastern Europe;Central Europe | Polish | zloty;złoty;Polish zloty;Polish złoty
Hungary     | Budapest | Europe;Eastern Europe;Central Europe | Hungarian | forint;Hungarian forint
Austria     | Vienna | Europe;Central Europe | German | Euro
Switzerland | Bern | Europe;Central Europe | German;Swiss German | Swiss franc;franc
Ireland     | Dublin | Europe | Irish;English | Euro
Russia      | Moscow | Europe;Asia;Eastern Europe | Russian | ruble;rouble;Russian ruble
Ukraine     | Kyiv;Kiev | Europe;Eastern Europe | Ukrainian | hryvnia;Ukrainian hryvnia
Turkey      | Ankara | Europe;Asia;Western Asia | Turkish | lira;Turkish lira
Japan       | Tokyo | Asia;East Asia | Japanese | yen;Japanese yen
China       | Beijing | Asia;East Asia | Chinese;Mandarin;Standard Chinese | yuan;renminbi;Chinese yuan
India       | New Delhi;Delhi | Asia;South Asia | Hindi;English | rupee;Indian rupee
Pakistan    | Islamabad | Asia;South Asia | Urdu | rupee;Pakistani rupee
Thailand    | Bangkok | Asia;Southeast Asia | Thai | baht;Thai baht
Vietnam     | Hanoi | Asia;Southeast Asia | Vietnamese | dong;Vietnamese dong;đồng
Indonesia   | Jakarta | Asia;Southeast Asia | Indonesian;Bahasa Indonesia | rupiah;Indonesian rupiah
Iran        | Tehran | Asia;Western Asia | Persian;Farsi | rial;Iranian rial
Iraq        | Baghdad | Asia;Western Asia | Arabic | dinar;Iraqi dinar
Israel      | Jerusalem | Asia;Western Asia | Hebrew | shekel;Israeli shekel
Egypt       | Cairo | Africa;North Africa;Northeast Africa | Arabic | Egyptian pound;pound
Kenya       | Nairobi | Africa;East Africa;Eastern Africa | English;Swahili | Kenyan shilling;shilling
Nigeria     | Abuja | Africa;West Africa | English | naira;Nigerian naira
Ghana       | Accra | Africa;West Africa | English | cedi;Ghanaian cedi
Ethiopia    | Addis Ababa | Africa;East Africa | Amharic | birr;Ethiopian birr
Morocco     | Rabat | Africa;North Africa | Arabic | dirham;Moroccan dirham
Canada      | Ottawa | North America | English;French | Canadian dollar;dollar
Mexico      | Mexico City | North America | Spanish | peso;Mexican peso
Cuba        | Havana | North America | Spanish | peso;Cuban peso
Brazil      | Brasília;Brasilia | South America | Portuguese | real;Brazilian real
Argentina   | Buenos Aires | South America | Spanish | peso;Argentine peso
Chile       | Santiago | South America | Spanish | peso;Chilean peso
Peru        | Lima | South America | Spanish | sol;nuevo sol;Peruvian sol
Colombia    | Bogotá;Bogota | South America | Spanish | peso;Colombian peso
Australia   | Canberra | Oceania;Australia | English | Australian dollar;dollar
New Zealand | Wellington | Oceania | English;Māori | New Zealand dollar;dollar
Bhutan      | Thimphu | Asia;South Asia | Dzongkha | ngultrum
Lesotho     | Maseru | Africa;Southern Africa | Sesotho;English | loti
Kiribati    | Tarawa;South Tarawa | Oceania | Gilbertese;English | Australian dollar
Tuvalu      | Funafuti | Oceania | Tuvaluan;English | Australian dollar
Eswatini    | Mbabane | Africa;Southern Africa | Swazi;English | lilangeni
Vanuatu     | Port Vila | Oceania | Bislama;English;French | vatu
Nauru       | Yaren | Oceania | Nauruan;English | Australian dollar
"""

_CITIES = """
Paris     | France | French | Europe
London    | England;United Kingdom | English | Europe
Berlin    | Germany | German | Europe
Munich    | Germany | German | Europe
Hamburg   | Germany | German | Europe
Rome      | Italy | Italian | Europe
Milan     | Italy | Italian | Europe
Venice    | Italy | Italian | Europe
Madrid    | Spain | Spanish | Europe
Barcelona | Spain | Spanish;Catalan | Europe
Lisbon    | Portugal | Portuguese | Europe
Athens    | Greece | Greek | Europe
Vienna    | Austria | German | Europe
Moscow    | Russia | Russian | Europe
Warsaw    | Poland | Polish | Europe
Dublin    | Ireland | English;Irish | Europe
Stockholm | Sweden | Swedish | Europe
Oslo      | Norway | Norwegian | Europe
Istanbul  | Turkey | Turkish | Europe;Asia
Tokyo     | Japan | Japanese | Asia
Kyoto     | Japan | Japanese | Asia
Osaka     | Japan | Japanese | Asia
Beijing   | China | Chinese;Mandarin | Asia
Shanghai  | China | Chinese;Mandarin;Shanghainese | Asia
Mumbai    | India | Hindi;Marathi;English | Asia
Delhi     | India | Hindi | Asia
Bangkok   | Thailand | Thai | Asia
Hanoi     | Vietnam | Vietnamese | Asia
Seoul     | South Korea;Korea | Korean | Asia
Tehran    | Iran | Persian;Farsi | Asia
Baghdad   | Iraq | Arabic | Asia
Cairo     | Egypt | Arabic | Africa
Nairobi   | Kenya | Swahili;English | Africa
Lagos     | Nigeria | English;Yoruba | Africa
Toronto   | Canada | English | North America
Chicago   | United States;USA;America | English | North America
Lima      | Peru | Spanish | South America
Havana    | Cuba | Spanish | North America
Sydney    | Australia | English | Australia;Oceania
Melbourne | Australia | English | Australia;Oceania
Plovdiv   | Bulgaria | Bulgarian | Europe
Liepāja   | Latvia | Latvian | Europe
Tamale    | Ghana | Dagbani | Africa
Mwanza    | Tanzania | Swahili | Africa
Encarnación | Paraguay | Spanish;Guaraní | South America
Tartu     | Estonia | Estonian | Europe
"""

_PEOPLE = """
Albert Einstein | physicist;theoretical physicist;scientist | Germany | physics;theoretical physics;relativity
Isaac Newton    | physicist;mathematician;scientist;English physicist | England;Britain;Great Britain | physics;mathematics;gravity
Charles Darwin  | naturalist;biologist;scientist;English naturalist | England;Britain | evolution;biology;natural selection
Marie Curie     | physicist;chemist;scientist;Polish physicist;French physicist | Poland | radioactivity;physics;chemistry;radiation
Galileo Galilei | astronomer;physicist;Italian astronomer;scientist | Italy | astronomy;physics
Louis Pasteur   | chemist;microbiologist;French chemist;scientist | France | microbiology;chemistry;medicine
Nikola Tesla    | inventor;engineer;electrical engineer | Serbia;Croatia;Austria | electricity;electrical engineering
Sigmund Freud   | psychologist;psychoanalyst;psychiatrist;neurologist | Austria | psychoanalysis;psychology;psychiatry
Wolfgang Amadeus Mozart | composer;musician;Austrian composer;classical composer | Austria | music;classical music;opera
Ludwig van Beethoven | composer;musician;German composer;classical composer;pianist | Germany | music;classical music
Johann Sebastian Bach | composer;musician;German composer;organist | Germany | music;classical music
William Shakespeare | playwright;poet;writer;English playwright;dramatist | England;Britain | literature;drama;poetry;theater
Charles Dickens | writer;novelist;author;English novelist;English writer | England;Britain | literature
Jane Austen     | novelist;writer;author;English novelist;English writer | England;Britain | literature
Mark Twain      | writer;novelist;author;humorist;American writer;American author | United States;America | literature
Leo Tolstoy     | writer;novelist;Russian writer;Russian novelist;author;Russian author | Russia | literature
Pablo Picasso   | painter;artist;Spanish painter;Spanish artist | Spain | painting;art;cubism
Vincent van Gogh | painter;artist;Dutch painter;Dutch artist | Netherlands;Holland | painting;art
Leonardo da Vinci | painter;artist;Italian artist;inventor;polymath;Italian painter | Italy | painting;art;anatomy
Claude Monet    | painter;artist;French painter;French artist | France | painting;art;impressionism
Michelangelo    | sculptor;painter;artist;Italian sculptor;Italian artist | Italy | sculpture;painting;art;architecture
Plato           | philosopher;Greek philosopher | Greece | philosophy;ethics
Aristotle       | philosopher;Greek philosopher | Greece | philosophy;ethics;logic
Immanuel Kant   | philosopher;German philosopher | Germany;Prussia | philosophy;ethics;epistemology;metaphysics
Karl Marx       | philosopher;economist;German philosopher;sociologist | Germany;Prussia | philosophy;economics;sociology
Napoleon Bonaparte | general;military leader;French general;emperor | France | military;warfare
Abraham Lincoln | president;politician;lawyer;American president | United States;America | politics;law
George Washington | general;president;military leader;politician | United States;America | politics;military
Mahatma Gandhi  | lawyer;leader;Indian leader;activist;politician | India | nonviolence;politics
Christopher Columbus | explorer;Italian explorer;navigator | Italy | exploration;navigation
Emmy Noether    | mathematician;German mathematician | Germany | mathematics;algebra
Niels Abel      | mathematician;Norwegian mathematician | Norway | mathematics
Otto Loewi      | pharmacologist;physiologist | Germany | pharmacology
"""

_INVENTED = {
    "country": """
        Tuls Kolk Wak Mard Algon Moy Mou Kak Luk Zak Schwe Kand Tir Sey Parth Hok Kamp Erd Hask Kri Niss Krak Aure Sart Lau
        Cors Lok Fram Gom Shor Tant Gond Elis Moll Lef Siem Kad Vest Dors Caled Manch Ner Dag Kok Paso Wien Feld Pang
        Veltora, Quandor, Marovia, Drusenland, Tavikstan, Osmeria, Beltravia, Norvania, Zarkovia, Halmora, Pelundia, Kitaraz
        North Veltor, New Tavik, South Marova, Upper Drusen, East Halmor, Ulmeria, Savondia, Grestania, Yulandra, Ombrazia""",
    "city": """
        Hild Brady Bake Guill Sutton Rivera Browning Thal Lod Vert Zel Fors Bram Dunn Harding Dix Chir Luft Payne Kerr
        Fowler Snyder Dixon Wick Barker Putnam Owens Lyons Hass Becker Adler Berger Lambert Keyn Baum Hahn Lange Norris Burr
        Veltorin, Quandale, Marovik, Drusenheim, Taviksted, Osmerton, Beltrave, Norvanta, Zarkograd, Halmoro, Pelunda, Kitarat
        Port Veltor, New Quanda, Lower Maro, San Tavik, Ulmerton, Savonde, Grestan, Yulanda, Ombraza, Fenwickton""",
    "person": """
        Laurence Collier, Alison Wick, Norris Weaver, Clifford Barker, Edith Lyons, Randall Fowler, Wendy Gibbs, Josef Kerr
        Clarence Snyder, Judy Harding, Melissa Owens, Bobby Dunn, Ethan Barber, Diane Hass, Roland Putnam, Marianne Cork
        Isabel Lange, Quincy Moll, Werner Gom, Lauren Kolk, Jorge Brady, Shirley Dew, Kerry Thal, Naomi Vest, Preston Luk
        Amara Veltorin, Dusan Quandt, Ilse Maroviak, Terrence Hobbleworth, Yusra Beltravi, Oddvar Fensgaard, Pilar Zarkov
        Anton Grellwick, Marta Osmeric, Benedek Tavi, Corin Halmorsen, Sanne de Vrook, Ludo van Pelt, Emil Kastrander
        Johann Peter Wexel, Maria Luz Ombraza, Hans Erik Drusen, Karl Otto Fenn, Anna Lise Moor, Jean Paul Grest, Weaver,
        Collier""",
}


@dataclass(frozen=True)
class Entity:
    """A name, its type, and attribute → accepted answers (none for invented names)."""

    name: str
    kind: Kind
    answers: Mapping[str, tuple[str, ...]]


def candidates() -> list[Entity]:
    """The real entities, in the order of the tables."""
    tables = (
        ("country", _COUNTRIES, ("capital", "continent", "language", "currency")),
        ("city", _CITIES, ("country", "language", "continent")),
        ("person", _PEOPLE, ("occupation", "country", "field")),
    )
    found = []
    for kind, table, columns in tables:
        for line in table.strip().splitlines():
            name, *cells = (cell.strip() for cell in line.split("|"))
            given = dict(zip(columns, (tuple(cell.split(";")) for cell in cells), strict=True))
            found.append(Entity(name, kind, given))
    return found


def invented() -> list[Entity]:
    """Names of nothing, each type's in the order given: many of one token, as real names are, then longer ones."""
    found = []
    for kind, text in _INVENTED.items():
        names: list[str] = []
        for line in text.strip().splitlines():
            names += [name.strip() for name in (line.split(",") if "," in line else line.split())]
        found += [Entity(name, kind, {}) for name in names]
    if len({entity.name for entity in found}) < len(found):
        raise ValueError("an invented name is given twice")
    return found
