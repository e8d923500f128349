"""What is read as a number, and what must not be: each by hand."""

from fractions import Fraction

import pytest

from jaxgpt.rl.final_number import final_number

PLAIN = {
    "1 000": "1000",
    "1 000 000.5": "2000001/2",
    r"\boxed{42}": "42",
    r"\boxed{-3/4}": "-3/4",
    "so x = 5.": "5",
    "**21**": "21",
    "is **21**": "21",
    "7 **21**": "21",
    "_5_": "5",
    "*5*": "5",
    "= -5": "-5",
    "- 5 apples": "5",
    r"42\%": "42",
    "50%": "50",
    "$42$": "42",
    r"\$42": "42",
    r"\(42\)": "42",
    r"42\text{ cm}": "42",
    r"90^\circ": "90",
    "1.5e3": "1500",
    "5!": "5",
    "1, 2, 3": "3",
    "5 km/h": "5",
    "1 024": "1024",
    "(42)": "42",
    "answer: (42)": "42",
    "the answer is—5": "5",
    "#### 1 000": "1000",
    "#### 5 because 3 + 4": "5",
    "#### $5": "5",
    "#### -5": "-5",
    "#### 5.": "5",
    "#### 1,234.50": "2469/2",
    "#### **$21.00**, not 22": "21",
    "<<7*3=21>>21": "21",
    "Step 3: -5": "-5",
    "in 2020, 300 people": "300",
    "in 2020 300 people": "300",
    "(1, 2)": "2",
    "18 m²": "18",
    "18 m2": "18",
    "|5|": "5",
    "1\u2009000": "1000",
    "12\u202f345": "12345",
    "1\u00a0234\u00a0567": "1234567",
    "21\n- 5": "5",
}
EXPRESSIONS = [
    r"\frac{1}{2}",
    "2^{10}",
    "2^10",
    "10^{-3}",
    "1_000",
    "1/0",
    r"\boxed{\frac{3}{4}}",
    "7*3",
    "7 * 3",
    "7 *3",
    "7 × 3",
    "2-5",
    "2 - 5",
    "2 -5",
    "2 + 5",
    r"\sqrt{16}",
    "√16",
    r"\frac12",
    r"The 3 parts are \frac12",
    r"2\pi",
    "2½",
    "2 ½",
    "½",
    "half of 3 is ½",
    "1e4000",
    "0x1F",
    "3x2",
    "3:45",
    "2:1",
    "1,2345",
    "1,2,3",
    "3,5",
    "1.2.3",
    "2020-01-05",
    "1/2/2020",
    "12 345",
    r"1\,000",
    "1{,}000",
    "1'000",
    "1'234",
    "pages 2–5",
    "COVID-19",
    "sqrt(2)",
    "log(8)",
    "x/2",
    "a_5",
    "3 / 4",
    "#### 1/0",
    "#### 2^{10}",
    "#### 2+3=5",
    "#### 12 345",
    r"#### \frac{1}{2}",
    "±5",
    r"x = \pm 5",
    r"7 \times 3",
    "(1,2)",
    "٣",
    "5²",
    "1.5×10³",
]


@pytest.mark.parametrize("text", PLAIN)
def test_a_plain_number_is_read_exactly(text):
    assert final_number(text) == Fraction(PLAIN[text])


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_an_expression_is_no_number_and_no_part_of_it_is_one(text):
    assert final_number(text) is None


@pytest.mark.parametrize(
    "text", ["9" * 100_000, "111 " * 20_000, "*" * 50_000 + "5", "5 " * 40_000, "1 " * 40_000 + "000"]
)
def test_long_texts_are_read_in_linear_time(text):
    final_number(text)  # quadratic time would take minutes
