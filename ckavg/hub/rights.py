"""Stage *publish*: what the Hub tells of a token and its user, as the right to write. Pure."""

from __future__ import annotations

from typing import Any

from ckavg.hub.answers import may_not_write

_WRITE, _DISCUSS = "repo.write", "discussion.write"
_ROLES_THAT_WRITE = ("admin", "write", "contributor")


def check_token(me: dict[str, Any], repo: str, endpoint: str, *, create_pr: bool) -> None:
    """Refuse a token that may write nowhere or, if it is fine-grained, not there.

    Args:
        me: what the Hub answers to `whoami`. A kind of token that is not known is left to the Hub.
        repo: `owner/name`.
        endpoint: address of the Hub.
        create_pr: whether a pull request is enough.

    Raises:
        HubError: it may not.
    """
    token = (me.get("auth") or {}).get("accessToken") or {}
    role = token.get("role")
    if role == "read":
        raise may_not_write(repo, endpoint, "it is a read token")
    if role != "fineGrained":
        return
    owner = repo.partition("/")[0].lower()
    needed = (_WRITE, _DISCUSS) if create_pr else (_WRITE,)
    fine = token.get("fineGrained") or {}
    granted = set(fine.get("global") or ())
    for scope in fine.get("scoped") or ():
        if str((scope.get("entity") or {}).get("name", "")).lower() in (owner, repo.lower()):
            granted.update(scope.get("permissions") or ())
    if not granted.intersection(needed):
        raise may_not_write(repo, endpoint, f"it is fine-grained, without {' or '.join(needed)} for {repo}")


def may_create(me: dict[str, Any], repo: str, endpoint: str) -> bool:
    """Whether the owner of a repository to be created is the token's user or an organization that lets the user write.

    Raises:
        HubError: it is an organization that does not.
    """
    owner = repo.partition("/")[0]
    if owner.lower() == str(me["name"]).lower():
        return True
    for each in me.get("orgs") or ():
        if str(each.get("name", "")).lower() == owner.lower():
            role = each.get("roleInOrg")
            if role is None or role in _ROLES_THAT_WRITE:
                return True
            raise may_not_write(repo, endpoint, f"{me['name']} has the role {role} in {owner}")
    return False
