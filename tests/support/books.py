"""What every money test ends with: balance, held, and an audit that adds up."""

from typing import Any

from tests.support.process import Account, RunningProxy


def milli(credits_: float) -> int:
    """Credits as the integer of thousandths that the books hold."""
    return round(credits_ * 1000)


def assert_books(proxy: RunningProxy, account: Account, credits: float, held: float = 0.0) -> None:
    """The account has exactly these credits and holds, and the books of the whole database add up."""
    shown = proxy.account(account.name)
    assert (milli(shown["credits"]), milli(shown["held"])) == (milli(credits), milli(held)), shown
    assert milli(shown["free"]) + milli(shown["paid"]) == milli(shown["credits"]), shown
    assert_audit(proxy)


def assert_audit(proxy: RunningProxy) -> dict[str, Any]:
    """`audit` passes, and its totals do add up."""
    audit = proxy.audit()
    assert audit["ok"] is True, audit
    grants, lapsed, charges = (milli(audit[name]) for name in ("grants", "lapsed", "charges"))
    assert grants - lapsed - charges == milli(audit["balances"]), audit
    return audit
