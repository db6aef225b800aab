"""Names of languages: codes, English names and their own, regions and case become one code."""

from __future__ import annotations

import re

from mmtransfer.errors import UserError

# Whisper's code (ISO 639-1 where there is one), then other codes and names of the same language.
_LANGUAGES = """
af afr afrikaans
am amh amharic
ar ara arabic arb العربية
as asm assamese
az aze azerbaijani azeri
ba bak bashkir
be bel belarusian
bg bul bulgarian български
bn ben bengali bangla বাংলা
bo tib bod tibetan
br bre breton
bs bos bosnian
ca cat catalan valencian català
cs cze ces czech čeština
cy wel cym welsh cymraeg
da dan danish dansk
de ger deu german deutsch
el gre ell greek ελληνικά
en eng english
es spa spanish castilian español
et est estonian
eu baq eus basque euskara
fa per fas persian farsi فارسی
fi fin finnish suomi
fo fao faroese
fr fre fra french français
gl glg galician galego
gu guj gujarati
ha hau hausa
haw hawaiian
he iw heb hebrew עברית
hi hin hindi हिन्दी हिंदी
hr hrv croatian hrvatski
ht hat haitian haitian-creole
hu hun hungarian magyar
hy arm hye armenian
id in ind indonesian
is ice isl icelandic
it ita italian italiano
ja jp jpn japanese 日本語
jw jv jav javanese
ka geo kat georgian
kk kaz kazakh
km khm khmer
kn kan kannada
ko kor korean 한국어
la lat latin
lb ltz luxembourgish letzeburgesch
ln lin lingala
lo lao
lt lit lithuanian
lv lav latvian
mg mlg malagasy
mi mao mri maori
mk mac mkd macedonian
ml mal malayalam
mn mon mongolian
mr mar marathi
ms may msa malay
mt mlt maltese
my bur mya burmese myanmar
ne nep nepali
nl dut nld dutch flemish nederlands
nn nno nynorsk
no nb nor nob norwegian bokmal bokmål norsk
oc oci occitan
pa pan punjabi panjabi
pl pol polish polski
ps pus pashto pushto
pt por portuguese português
ro mo rum ron mol romanian moldavian moldovan română
ru rus russian русский
sa san sanskrit
sd snd sindhi
si sin sinhala sinhalese
sk slo slk slovak
sl slv slovenian slovene
sn sna shona
so som somali
sq alb sqi albanian
sr srp serbian српски
su sun sundanese
sv swe swedish svenska
sw swa swahili
ta tam tamil தமிழ்
te tel telugu
tg tgk tajik
th tha thai ไทย
tk tuk turkmen
tl fil tgl tagalog filipino
tr tur turkish türkçe
tt tat tatar
uk ukr ukrainian українська
ur urd urdu
uz uzb uzbek
vi vie vietnamese tiếng-việt
yi yid yiddish
yo yor yoruba
yue cantonese 粤语 粵語
zh chi zho cmn chinese mandarin 中文 汉语 漢語 普通话
"""
_CODES = {
    name: line.split()[0] for line in _LANGUAGES.strip().splitlines() for name in line.split()
}
# The rest of ISO 639-1.
_OTHERS = """
aa ab ae ak an av ay bh bi bm ce ch co cr cu cv dv dz ee eo ff fj fy ga gd gn gv ho hz ia ie ig ii
ik io iu kg ki kj kl kr ks ku kv kw ky lg li lu mh na nd ng nr nv ny oj om or os pi qu rm rn rw sc
se sg sm ss st ti tn to ts tw ty ug ve vo wa wo xh za zu
"""
_CODES |= {code: code for code in _OTHERS.split()}
_KINDS = {  # "Brazilian Portuguese", "Standard German"
    *("american", "australian", "brazilian", "british", "canadian", "european", "indian"),
    *("mexican", "modern", "simplified", "standard", "swiss", "traditional", "us", "uk"),
}
_LONG_CODE = re.compile(r"[a-z]{3}")  # ISO 639-3 has thousands; a model knows which it has
_TAGS = re.compile(r"([a-z]{4}|[a-z]{2}|[0-9]{3})?(-([a-z]{2,8}|[0-9]{3,4}))*")  # script, region
_NONE = {"und", "mul", "mis", "zxx"}  # its codes for no language in particular


def normal_language(name: str) -> str | None:
    """The code of a language by whatever name: `English`, `en-US`, `ZH_cn`, `deu`, `<|en|>`; None
    for what names none. Codes of three letters that are not known here stay as they are.
    """
    plain = re.sub(r"[\s_]+", "-", name.strip().strip("<|>").strip().casefold())
    plain = re.sub(r"-*\(.*\)$|[.@].*", "", plain)  # "Chinese (Simplified)", "de_DE.UTF-8"
    if plain in _CODES:
        return _CODES[plain]
    first, _, rest = plain.partition("-")
    if first in _KINDS and rest in _CODES:
        return _CODES[rest]
    if plain.startswith("zh-yue"):
        return "yue"
    if rest not in _KINDS and not _TAGS.fullmatch(rest):
        return None
    if first in _CODES:
        return _CODES[first]
    return first if _LONG_CODE.fullmatch(first) and first not in _NONE else None


def is_listed(code: str) -> bool:
    """Whether a code is that of a language named here, and not just any three letters."""
    return code in _CODES


def read_language(name: str, where: str) -> str:
    """The code of a language that somebody named; `where` begins the message.

    Raises:
        UserError: it names none.
    """
    found = normal_language(name)
    if found is None:
        raise UserError(
            f"{where}: expected a language such as en, en-US or English, found {name[:40]!r}."
        )
    return found
