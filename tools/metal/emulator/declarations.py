"""Every name that a Metal text declares: where it stands, what it names and in what scope.

The reader knows as much of C++'s grammar as tells a declaration from an expression. It goes by
places, not by words: what stands where a name must is a name, even if it is a keyword, so that the
rules in `reserved` can refuse it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .tokens import Token, matching, matching_angle
from .words import word_set

RECORDS = ("struct", "class", "union")
_QUALIFIERS = word_set(
    """
    const volatile constexpr static inline extern mutable register typename thread_local explicit
    virtual friend device constant thread threadgroup threadgroup_imageblock ray_data object_data
    kernel vertex fragment restrict
    """
)
_SIMPLE = word_set(
    """
    void bool char short int long float double signed unsigned auto half bfloat wchar_t char16_t
    char32_t
    """
)
# Which of C++'s own words make one type together: "unsigned long", and not "float int".
_COMBINED = word_set("char short int long signed unsigned double")
_PREFIX = word_set("short long signed unsigned")
_STATEMENTS = word_set("if for while switch do else return break continue case default goto")
_ACCESS = word_set("public private protected")


@dataclass(frozen=True)
class Declaration:
    """One declared name.

    ``kind`` is variable, parameter, function, member, type, alias, enumerator, template parameter,
    namespace or label; ``scope`` is namespace, type or function, and of a parameter what is around
    its function. ``type`` are the tokens before the name, which is token ``at`` of the text.
    """

    kind: str
    token: Token
    scope: str
    type: tuple[Token, ...] = ()
    at: int = -1
    qualified: bool = False  # defined outside of what declares it: A::f


@dataclass
class _Reader:
    tokens: list[Token]
    found: list[Declaration] = field(default_factory=list)
    skipped: range = range(0)  # of the declaration now read, the declarators before this one

    def text(self, i: int) -> str:
        return self.tokens[i].text if 0 <= i < len(self.tokens) else ""

    def is_name(self, i: int) -> bool:
        return 0 <= i < len(self.tokens) and self.tokens[i].kind == "name"

    def add(self, kind: str, i: int, scope: str, start: int | None = None) -> None:
        kinds = {"variable": {"type": "member"}, "function": {"type": "member"}}
        kind = kinds.get(kind, {}).get(scope, kind)
        first = i if start is None else start
        before = tuple(self.tokens[k] for k in range(first, i) if k not in self.skipped)
        qualified = self.text(i - 1) == "::"
        self.found.append(Declaration(kind, self.tokens[i], scope, before, i, qualified))

    # --------------------------------------------------------------------------------- statements

    def region(self, i: int, end: int, scope: str) -> None:
        """Statements or declarations in [i, end)."""
        while i < end:
            after = self.statement(i, end, scope)
            i = after if after > i else i + 1

    def statement(self, i: int, end: int, scope: str) -> int:
        """One statement at ``i``; the index after it."""
        i = self.skip_attributes(i)
        text = self.text(i)
        if i >= end or text in (";", "}"):
            return i + 1
        if text == "{":
            close = matching(self.tokens, i)
            self.region(i + 1, close, scope)
            return close + 1
        labels = scope == "function" and self.is_name(i) and self.text(i + 1) == ":"
        if labels and text != "default":
            self.add("label", i, scope)
            return i + 2
        if text == "template" and self.text(i + 1) == "<":
            close = matching_angle(self.tokens, i + 1) or i + 1
            self.template_parameters(i + 2, close, scope)
            return self.statement(close + 1, end, scope)
        if text in ("static_assert", "template", "asm") or (
            text == "extern" and self.is_string(i + 1)
        ):
            return self.skip_to(i, end, ";") + 1
        if text == "namespace" or (text == "inline" and self.text(i + 1) == "namespace"):
            return self.namespace(i + (text == "inline"), end)
        if text == "using":
            return self.using(i, end, scope)
        if text == "typedef":
            return self.simple(i + 1, end, scope, "alias")
        if text in _ACCESS and self.text(i + 1) == ":":
            return i + 2
        if scope == "function" and text in _STATEMENTS:
            return self.control(i, end)
        return self.simple(i, end, scope, "variable")

    def is_string(self, i: int) -> bool:
        return 0 <= i < len(self.tokens) and self.tokens[i].kind == "string"

    def control(self, i: int, end: int) -> int:
        text, k = self.text(i), i + 1
        if text in ("else", "do", "default"):
            return k + (text == "default")
        if text == "case":
            while k < end and self.text(k) != ":":
                k = matching(self.tokens, k) + 1 if self.text(k) in "([{" else k + 1
            return k + 1
        if text in ("if", "for", "while", "switch"):
            k += self.text(k) == "constexpr"
            if self.text(k) == "(":
                close = matching(self.tokens, k)
                first = True
                # "if (a && b)" is a condition; "for (" begins with a statement.
                declares = text == "for" or any(
                    token.text in ("=", "{") for token in self.tokens[k + 1 : close]
                )
                for a, b in self.parts(k + 1, close, (";",)):
                    if first and declares:
                        self.simple(a, b, "function", "variable", alone=True)
                    else:
                        self.expression(a, b)
                    first = False
                return close + 1
            # Reached for "if = 4", not for "int if = 3".
        close = self.skip_to(i + 1, end, ";")
        self.expression(i + 1, close)
        return close + 1

    def namespace(self, i: int, end: int) -> int:
        k = i + 1
        while k < end and self.text(k) not in ("{", "=", ";"):
            if k in self.attribute_starts(k):
                k = self.skip_attributes(k)
                continue
            if self.is_name(k):
                self.add("namespace", k, "namespace")
            k += 1
        if self.text(k) == "{":
            close = matching(self.tokens, k)
            self.region(k + 1, close, "namespace")
            return close + 1
        return self.skip_to(k, end, ";") + 1

    def attribute_starts(self, k: int) -> tuple[int, ...]:
        return (k,) if self.text(k) == "[" and self.text(k + 1) == "[" else ()

    def using(self, i: int, end: int, scope: str) -> int:
        close = self.skip_to(i, end, ";")
        name = self.skip_attributes(i + 2)
        if self.is_name(i + 1) and self.text(name) == "=":
            self.add("alias", i + 1, scope)
            self.expression(name + 1, close)
        return close + 1

    # ------------------------------------------------------------------------------- declarations

    def simple(self, i: int, end: int, scope: str, kind: str, alone: bool = False) -> int:
        """A declaration, or else an expression up to its semicolon; ``alone``: up to ``end``."""
        start = i
        i, has_type, opened = self.specifiers(i, end, scope)
        if opened and self.text(i) == ";":
            return i + 1
        constructor = scope == "type" and self.text(start) != "~" and self.text(i) == "("
        if constructor and self.is_name(i - 1):
            return self.function(i, end, scope)  # whose name is its type's, which is declared
        if self.operator_end(i, scope):
            return self.declarator(start, i, end, scope, kind, alone)
        if not has_type or not self.declares(i, end, alone, opened or kind == "alias"):
            name = self.swallowed(start, i, alone)
            if name is not None:
                self.add(kind, name, scope, start)
            close = end if alone else self.skip_to(i, end, ";")
            self.expression(start, close)
            return close + 1
        first = i
        while i < end:
            self.skipped = range(first, i)
            i = self.declarator(start, i, end, scope, kind, alone)
            self.skipped = range(0)
            if self.text(i - 1) == "}":
                return i
            if i >= end or self.text(i) != ",":
                break
            i += 1
        return i + 1

    def swallowed(self, start: int, i: int, alone: bool) -> int | None:
        """In "const int const = 1" the last word is in the place of the name."""
        ends = ("=", "[", ",", "{") + (() if alone else (";",))
        last = i - 1
        if last <= start or not self.is_name(last) or self.text(i) not in ends:
            return None
        word = self.text(last)
        before = [self.text(k) for k in range(start, last)]
        typed = any(w in _SIMPLE or w not in _QUALIFIERS for w in before if w not in ("*", "&"))
        ordinary = "<" in before or all(
            self.is_name(k) or self.text(k) in ("*", "&", "::") for k in range(start, last)
        )
        return last if word in _QUALIFIERS | _SIMPLE and typed and ordinary else None

    def specifiers(self, i: int, end: int, scope: str) -> tuple[int, bool, bool]:
        """Steps over qualifiers and the type. Returns where they end, whether there was a type, and
        whether it was defined here."""
        has_type = opened = False
        last = ""
        while i < end:
            i = self.skip_attributes(i)
            text = self.text(i)
            if has_type and self.stands_for_a_name(i):
                break
            if text in (*RECORDS, "enum"):
                after, opened = self.record(i, end, scope)
                if after == i:
                    break
                i, has_type, last = after, True, ""
            elif text in ("alignas", "__attribute__", "decltype", "typeof", "__typeof__"):
                has_type = has_type or text not in ("alignas", "__attribute__")
                i = matching(self.tokens, i + 1) + 1 if self.text(i + 1) == "(" else i + 1
            elif text in _QUALIFIERS:
                i += 1
            elif text in _SIMPLE and (not has_type or (last in _PREFIX and text in _COMBINED)):
                if has_type and text not in _COMBINED:
                    break
                i, has_type, last = i + 1, True, text
            elif text == "operator":
                break
            elif self.is_name(i) and not has_type and text not in _STATEMENTS:
                after = self.type_name(i, end)
                if after == i:
                    break
                i, has_type, last = after, True, ""
            elif text == "::" and not has_type:
                i += 1
            else:
                break
        return i, has_type, opened

    def stands_for_a_name(self, i: int) -> bool:
        """Whether the word at ``i``, after a type, is where its name must be: what follows ends a
        declarator, or the word could not follow a type otherwise."""
        text = self.text(i)
        if text in (*RECORDS, "enum", "decltype", "typeof", "__typeof__"):
            return True
        if text in ("alignas", "__attribute__"):
            close = matching(self.tokens, i + 1) if self.text(i + 1) == "(" else i + 1
            return close <= i + 2 or not self.is_name(close + 1)
        return text in _QUALIFIERS and self.ends_declarator(i + 1)

    def ends_declarator(self, i: int) -> bool:
        after = self.skip_attributes(i)
        if after > i and self.text(after) in (",", ")"):
            return True  # only a name has attributes behind it
        if self.text(after) == "(":
            return self.text(after + 1) not in ("&", "*", "&&")
        return self.text(after) in ("=", ";", "[", "{", ":")

    def type_name(self, i: int, end: int) -> int:
        """Steps over A::B<C>::D."""
        while i < end and self.is_name(i):
            i += 1
            if self.text(i) == "<":
                close = matching_angle(self.tokens, i)
                if close is None or close >= end:
                    return i
                i = close + 1
            if self.text(i) != "::":
                return i
            i += 1
            if self.text(i) == "template":
                i += 1
        return i

    def record(self, i: int, end: int, scope: str) -> tuple[int, bool]:
        """struct, class, union or enum at ``i``; the index after it, and whether it has a body."""
        word = self.text(i)
        k = i + 1
        scoped = word == "enum" and self.text(k) in ("class", "struct")
        k += scoped and self.text(k + 1) not in ("{", ":", ";")
        k = self.skip_attributes(k)
        while self.text(k) in ("alignas", "__attribute__") and self.text(k + 1) == "(":
            k = self.skip_attributes(matching(self.tokens, k + 1) + 1)
        name = None
        if self.is_name(k):
            name, k = k, k + 1
            while self.text(k) in ("::", "<"):
                if self.text(k) == "<":
                    k = (matching_angle(self.tokens, k) or k) + 1
                else:
                    name, k = k + 1, k + 2
        if self.text(k) == "final":
            k += 1
        if self.text(k) not in ("{", ":", ";"):
            return k, False  # struct S x;
        if name is not None:
            self.add("type", name, scope, i)
        if self.text(k) == ";":
            return k, True
        while k < end and self.text(k) != "{":
            k += 1
        close = matching(self.tokens, k)
        if word == "enum":
            for a, b in self.parts(k + 1, close, (",",)):
                if self.is_name(a):
                    self.add("enumerator", a, scope if scope != "type" else "type")
                    self.expression(a + 1, b)
        else:
            self.region(k + 1, close, "type")
        return close + 1, True

    def declares(self, i: int, end: int, alone: bool, sure: bool) -> bool:
        """Whether a declarator is at ``i``, after a type."""
        k = i
        stars = ("*", "&", "&&")
        while self.text(k) in stars or (
            k > i and self.text(k) in ("const", "volatile") and not self.ends_declarator(k + 1)
        ):
            k += 1
        if self.text(k) == "(" and self.text(k + 1) in ("&", "*", "&&"):
            return True
        if not self.is_name(k):
            return False
        after = self.skip_attributes(k + 1)
        while self.text(after) == "::":
            after += 2
        if sure or k == i:
            return True
        ends = ("=", ";", ",", "[", "(", "{", ":", ")")
        return self.text(after) in ends or (alone and after >= end)

    def declarator(self, start: int, i: int, end: int, scope: str, kind: str, alone: bool) -> int:
        """One declarator and its initialiser; the index of what ends it, or after a body."""
        while self.text(i) in ("*", "&", "&&") or (
            self.text(i) in ("const", "volatile", "restrict", "device", "constant", "thread")
            and not self.ends_declarator(i + 1)
            and self.text(i + 1) not in (",", "(")
        ):
            i += 1
        if self.text(i) == "(" and self.text(i + 1) in ("&", "*", "&&"):
            name = i + 2
            if self.is_name(name):
                self.add(kind, name, scope, start)
            i = matching(self.tokens, i) + 1
            if self.text(i) == "(":
                i = matching(self.tokens, i) + 1
        elif after := self.operator_end(i, scope):
            return self.function(after, end, scope)
        elif self.is_name(i):
            name = i
            i += 1
            while self.text(i) in ("::", "<"):  # A<B>::name
                if self.text(i) == "::":
                    if after := self.operator_end(i + 1, scope):
                        return self.function(after, end, scope)
                    name, i = i + 1, i + 2
                    continue
                close = matching_angle(self.tokens, i)
                if close is None:
                    break
                i = close + 1
            i = self.skip_attributes(i)
            if (
                self.text(i) == "("
                and kind != "alias"
                and (scope != "function" or self.prototype(i))
            ):
                self.add("function", name, scope, start)
                return self.function(i, end, scope)
            self.add(kind, name, scope, start)
        i = self.skip_attributes(i)
        while i < end and self.text(i) not in (",", ";"):
            if (after := self.lambda_end(i, end)) > i:
                i = after
            elif self.text(i) in ("(", "[", "{"):
                close = matching(self.tokens, i)
                self.expression(i + 1, close)
                i = close + 1
            elif self.text(i) == "<" and (close := self.arguments(i)) is not None:
                i = close + 1
            else:
                i += 1
        return i

    def operator_end(self, i: int, scope: str) -> int:
        """Where the parameters of the operator at ``i`` begin, or 0 if the word is none's: in a
        function "int operator = (a)" declares a variable."""
        if self.text(i) != "operator" or scope == "function":
            return 0
        if self.text(i + 1) == "(":
            return i + 3 if self.text(i + 2) == ")" and self.text(i + 3) == "(" else 0
        k = i + 1
        while k < len(self.tokens) and self.text(k) not in ("(", ";", "{", "}", ")"):
            k += 1
        symbols = all(self.tokens[n].kind == "mark" for n in range(i + 1, k))
        converts = self.text(i - 1) not in ("*", "&") and self.is_name(i + 1)
        return k if self.text(k) == "(" and (converts or (symbols and k - i <= 4)) else 0

    def arguments(self, i: int) -> int | None:
        """End of template arguments at ``i``, or None if this is a comparison."""
        close = matching_angle(self.tokens, i)
        if close is None or not self.is_name(i - 1):
            return None
        operators = ("=", "&&", "||", "==", "!=", "?", "+=", "-=")
        return None if any(self.text(k) in operators for k in range(i, close)) else close

    def prototype(self, i: int) -> bool:
        """Whether the parentheses at ``i`` are followed by a body: no variable's initialiser is."""
        return self.text(matching(self.tokens, i) + 1) == "{"

    def function(self, i: int, end: int, scope: str) -> int:
        """Parameters at ``i``, and what follows them up to the body or the semicolon."""
        close = matching(self.tokens, i)
        k = close + 1
        while k < end and self.text(k) not in (";", "{"):
            if self.text(k) in ("(", "["):
                k = matching(self.tokens, k)
            elif self.text(k) == "}":
                break
            # Of a constructor: ": member{value}, other(value) {".
            if self.is_name(k) and self.text(k + 1) == "{" and self.text(k - 1) in (":", ","):
                k = matching(self.tokens, k + 1)
            k += 1
        self.parameters(i + 1, close, scope, self.text(k) == "{")
        if self.text(k) == "{":
            body = matching(self.tokens, k)
            self.region(k + 1, body, "function")
            return body + 1
        return k

    def parameters(self, i: int, end: int, scope: str, has_body: bool) -> None:
        for a, b in self.parts(i, end, (",",)):
            self.parameter(a, b, scope, "parameter", has_body)

    def parameter(self, a: int, b: int, scope: str, kind: str, has_body: bool = True) -> None:
        if kind == "template parameter" and self.text(a) in ("typename", "class"):
            k = a + 1
            if self.text(k) == "...":
                k += 1
            if k < b and self.is_name(k) and self.text(k + 1) != "::":
                self.add(kind, k, scope, a)
            return
        if kind == "template parameter" and self.text(a) == "template":
            k = (matching_angle(self.tokens, a + 1) or a + 1) + 2
            if k < b and self.is_name(k):
                self.add(kind, k, scope, a)
            return
        i, has_type, _ = self.specifiers(a, b, scope)
        if not has_type:
            return
        pointer = False
        while i < b and (self.text(i) in ("*", "&", "&&", "...") or self.pointer_word(i)):
            pointer = pointer or self.text(i) == "*"
            i += 1
        if self.text(i) == "(" and self.text(i + 1) in ("&", "*", "&&") and i < b:
            i += 2
        if i < b and self.is_name(i):
            self.add(kind, i, scope, a)
            self.expression(i + 1, b)
            return
        # A qualifier at the end is one in the place of the name, but for "float* const" where a
        # function is only declared.
        last = i - 1
        if last > a and self.text(last) in _QUALIFIERS and (has_body or not pointer):
            before = [self.text(k) for k in range(a, last)]
            if any(w in _SIMPLE or w not in _QUALIFIERS for w in before):
                self.add(kind, last, scope, a)

    def pointer_word(self, i: int) -> bool:
        """A qualifier behind a star."""
        words = ("const", "volatile", "restrict", "device", "constant", "thread", "threadgroup")
        return self.text(i) in words and self.text(i - 1) in ("*", "&", *words)

    def template_parameters(self, i: int, end: int, scope: str) -> None:
        for a, b in self.parts(i, end, (",",)):
            self.parameter(a, b, scope, "template parameter")

    # -------------------------------------------------------------------------------- expressions

    def expression(self, i: int, end: int) -> None:
        """Looks for lambdas, which declare parameters and have bodies."""
        while i < end:
            i = max(self.lambda_end(i, end), i + 1)

    def lambda_end(self, i: int, end: int) -> int:
        """Reads the lambda at ``i``, if one is there; the index after its body, or ``i``."""
        if self.text(i) != "[" or self.text(i - 1) not in ("=", "(", ",", "return", "{", "?", ":"):
            return i
        k = matching(self.tokens, i) + 1
        if self.text(k) == "(":
            close = matching(self.tokens, k)
            self.parameters(k + 1, close, "function", True)
            k = close + 1
        while k < end and self.text(k) not in ("{", ";", ",", ")"):
            k += 1
        if self.text(k) != "{":
            return i
        close = matching(self.tokens, k)
        self.region(k + 1, close, "function")
        return close + 1

    # -------------------------------------------------------------------------------------- steps

    def skip_attributes(self, i: int) -> int:
        while self.text(i) == "[" and self.text(i + 1) == "[":
            i = matching(self.tokens, i) + 1
        return i

    def skip_to(self, i: int, end: int, mark: str) -> int:
        while i < end and self.text(i) != mark:
            if self.text(i) == "}":
                return i
            i = matching(self.tokens, i) + 1 if self.text(i) in "([{" and self.text(i) else i + 1
        return min(i, end)

    def parts(self, i: int, end: int, marks: tuple[str, ...]) -> Iterator[tuple[int, int]]:
        """Ranges between the marks at the top level of [i, end)."""
        first = i
        while i < end:
            text = self.text(i)
            if text in ("(", "[", "{"):
                i = matching(self.tokens, i)
            elif text == "<" and "," in marks:
                close = matching_angle(self.tokens, i)
                if close is not None and close < end:
                    i = close
            elif text in marks:
                yield first, i
                first = i + 1
            i += 1
        if first < end:
            yield first, end


def declarations(tokens: list[Token]) -> list[Declaration]:
    """Every declaration of preprocessed text, in order."""
    reader = _Reader(tokens)
    reader.region(0, len(tokens), "namespace")
    return sorted(reader.found, key=lambda d: (d.token.start, d.at))
