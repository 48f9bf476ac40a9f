"""Words and commands that the grader of mathematical answers knows: numbers, units, empty sets, clauses, functions."""

from __future__ import annotations

from fractions import Fraction

GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta", "θ": "theta",
    "ι": "iota", "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "π": "pi", "ρ": "rho", "σ": "sigma",
    "τ": "tau", "υ": "upsilon", "φ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega", "Γ": "Gamma", "Δ": "Delta",
    "Θ": "Theta", "Λ": "Lambda", "Ξ": "Xi", "Π": "Pi", "Σ": "Sigma", "Φ": "Phi", "Ψ": "Psi", "Ω": "Omega",
}  # fmt: skip
SYMBOL_COMMANDS = set(GREEK.values()) - {"pi"} | {"ell", "hbar", "varepsilon"}

# other names of commands -> the one that the parser knows
SYNONYMS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "leq": "le",
    "leqslant": "le", "leqq": "le", "lt": "<", "geq": "ge", "geqslant": "ge", "geqq": "ge", "gt": ">", "neq": "ne",
    "simeq": "approx", "doteq": "approx", "thickapprox": "approx", "varnothing": "emptyset", "rightarrow": "to",
    "longrightarrow": "to", "longmapsto": "mapsto", "Rightarrow": "implies", "Longrightarrow": "implies",
    "Leftrightarrow": "iff", "Longleftrightarrow": "iff", "vee": "lor", "wedge": "land", "backslash": "setminus",
    "smallsetminus": "setminus", "minus": "setminus", "dots": "ldots", "cdots": "ldots", "dotsc": "ldots",
    "dotsb": "ldots", "cdotp": "cdot", "ast": "cdot", "bullet": "cdot", "infinity": "infty", "inf": "infty",
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "tg": "tan", "ctg": "cot", "arctg": "atan", "lg": "log10",
    "varphi": "phi", "vartheta": "theta", "varrho": "rho", "varsigma": "sigma", "degree": "degree", "deg": "degree",
    "R": "mathbbR", "Reals": "mathbbR", "reals": "mathbbR", "N": "mathbbN", "Z": "mathbbZ", "Q": "mathbbQ",
    "C": "mathbbC", "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[", "rbrack": "]", "lvert": "|", "rvert": "|",
    "vert": "|", "lVert": "|", "rVert": "|", "slash": "/", "colon": ":", "prime": "'", "over": "over",
    "bmod": "mod", "percent": "%",
}  # fmt: skip
COMMAND_WORDS = {"lor": "or", "land": "and", "forall": "for", "degree": "degree"}

FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "arcsin", "arccos", "arctan", "sinh", "cosh",
    "tanh", "ln", "log", "lg", "exp", "sqrt", "frac", "binom", "gcd", "lcm", "max", "min", "pi", "theta", "alpha",
    "beta", "infty", "inf", "infinity", "pm", "cup", "mod", "emptyset", "cdot", "times", "le", "ge", "leq", "geq",
}  # fmt: skip

_UNITS_AND_TEENS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NUMBER_WORDS = {word: value for value, word in enumerate(_UNITS_AND_TEENS)}
NUMBER_WORDS |= {word: 10 * value for value, word in enumerate(_TENS, start=2)}
NUMBER_WORDS |= {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

# Names for the empty set, as text without spaces.
EMPTY_PHRASES = {
    "nosolution", "nosolutions", "norealsolution", "norealsolutions", "nosolutionsexist", "nosolutionexists", "none",
    "emptyset", "theemptyset", "nointegersolution", "nointegersolutions", "norealroots", "norealroot",
    "therearenosolutions", "thereisnosolution", "therearenorealsolutions", "thereisnorealsolution", "noroots",
    "nosuchintegers", "nosuchnumber", "nosuchnumbers", "noneexist", "novalues", "novalue", "norealvalues", "empty",
}  # fmt: skip
UNDEFINED_PHRASES = {"undefined", "doesnotexist", "dne", "notdefined", "nolimit", "limitdoesnotexist"}
ALL_REALS_PHRASES = {"allrealnumbers", "allreals", "realnumbers", "anyrealnumber", "therealnumbers", "allrealx"}

SEPARATORS = {"and", "or"}
# A clause restricts an answer; "if" chooses between answers and is never optional.
OPTIONAL_CLAUSES = {"for", "where", "with", "when", "assuming", "given", "provided", "whenever", "such"}
CLAUSES = OPTIONAL_CLAUSES | {"if", "unless", "otherwise", "but", "except", "while"}
QUANTIFIER_WORDS = {
    "for", "where", "with", "any", "all", "every", "each", "some", "is", "are", "an", "a", "the", "arbitrary", "real",
    "constant", "constants", "integer", "integers", "number", "numbers", "reals", "nonzero", "being", "complex",
    "value", "values", "of", "natural", "rational", "non-negative", "and",
}  # fmt: skip
# Words before an answer that do not change it.
FILLERS = {
    "approximately", "about", "exactly", "roughly", "approx", "only", "is", "a", "an", "the", "total", "simply", "just",
    "all", "values", "value", "equals", "equal", "to",
}  # fmt: skip
ANSWER_WORDS = {"answer", "option", "choice", "ans"}
# Words that make an answer something else than a quantity of units.
_NO_UNITS = CLAUSES | SEPARATORS | FILLERS | {
    "not", "no", "maybe", "perhaps", "than", "less", "more", "most", "least", "between", "from", "in", "on", "by", "at",
    "times", "plus", "minus", "divided", "over", "squared", "cubed", "half", "root", "instead", "rather", "possibly",
    "either", "neither", "nor", "then", "so", "because", "since", "as", "greater", "smaller", "even", "odd",
    "yes", "true", "false", "i", "think", "probably", "hence", "thus", "therefore", "which", "that", "this", "it",
}  # fmt: skip

_LENGTH = {
    "mm millimeter millimeters millimetre millimetres": "1/1000",
    "cm centimeter centimeters centimetre centimetres": "1/100", "dm decimeter decimeters": "1/10",
    "m meter meters metre metres": 1, "km kilometer kilometers kilometre kilometres kms": 1000,
    "in inch inches": "254/10000", "ft foot feet": "3048/10000", "yd yds yard yards": "9144/10000",
    "mi mile miles": "1609344/1000",
}  # fmt: skip
_TIME = {
    "ms millisecond milliseconds": "1/1000", "s sec secs second seconds": 1, "min mins minute minutes": 60,
    "h hr hrs hour hours": 3600, "day days": 86400, "week weeks wk wks": 604800,
}  # fmt: skip
_OTHERS = {
    "mass": {"mg milligram milligrams": "1/1000", "g gram grams gm": 1, "kg kilogram kilograms kgs": 1000,
             "lb lbs pound pounds": "45359237/100000", "oz ounce ounces": "45359237/1600000"},
    "volume": {"ml milliliter milliliters millilitres": "1/1000", "l liter liters litre litres": 1},
    "gallon": {"gal gals gallon gallons": 4, "quart quarts qt": 1, "pint pints": "1/2", "cup cups": "1/4"},
    "money": {"dollar dollars usd": 1, "cent cents": "1/100"},
    "year": {"yr yrs year years": 12, "month months": 1},
    "angle": {"degree degrees deg degs": 1},
    "temperature": {"celsius": 1}, "fahrenheit": {"fahrenheit": 1},
    "rupee": {"rupee rupees rs": 1}, "euro": {"euro euros": 1}, "sterling": {"sterling": 1}, "yen": {"yen": 1},
    "percent": {"percent percentage pct": 1},
    "newton": {"newton newtons": 1}, "joule": {"joule joules": 1}, "watt": {"watt watts": 1}, "volt": {"volt volts": 1},
    "hertz": {"hz hertz": 1}, "ohm": {"ohm ohms": 1}, "radian": {"radian radians rad rads": 1},
    "square": {"unit units": 1},
}  # fmt: skip

# word -> (dimension, size in the base unit of the dimension)
UNITS: dict[str, tuple[str, Fraction]] = {
    word: (dimension, Fraction(size))
    for dimension, table in {"length": _LENGTH, "time": _TIME, **_OTHERS}.items()
    for words, size in table.items()
    for word in words.split()
}
COMPOUND_UNITS = {"mph": "mile per hour", "kmh": "km per hour", "kph": "km per hour", "kmph": "km per hour",
                  "sqft": "square foot", "cc": "cubic cm", "mps": "m per second"}  # fmt: skip
ORDINALS = {"st", "nd", "rd", "th"}
# A letter alone is a symbol, unless \text says otherwise; one of these after a space and a number is a unit.
BARE = " ~"  # behind such a unit: in a label it may be a symbol
LETTER_UNITS = {"m", "s", "g", "h", "L"}

KNOWN_WORDS = {
    word
    for word in (
        set(UNITS) | set(COMPOUND_UNITS) | set(NUMBER_WORDS) | SEPARATORS | CLAUSES | ORDINALS | ANSWER_WORDS
        | {"no", "yes", "none", "not", "even", "odd", "the", "all", "any", "per", "sq", "cubic", "dne", "am", "pm",
           "base",
           "two", "from", "than", "true", "false", "east", "west", "north", "south", "or", "if", "for", "but", "is"}
    )
    if len(word) > 1 and word not in {"ms", "in", "min", "mi", "rs", "ml", "st", "nd", "rd", "th", "rad"}
}  # fmt: skip


def is_unit_word(word: str) -> bool:
    """Return whether ``word`` may follow a number as a unit or as the thing counted."""
    return word.lower() not in _NO_UNITS
