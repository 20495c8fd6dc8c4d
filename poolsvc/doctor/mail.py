"""The mail server, as far as it can be asked without sending anything."""

from poolsvc.doctor.report import Examination, Finding, fail, ok, warn
from poolsvc.mail import Mailer, MailError


async def server(at: Examination) -> Finding:
    """Reachable, encrypted as the settings say, and of the opinion that our password is right."""
    mail = at.settings.mail
    if mail is None:
        return warn("there is no [mail]: nobody gets any", "set mail.smtp and mail.sender")
    try:
        mailer = Mailer(mail, pool=at.settings.pool, public_url=at.settings.public_url)
        await mailer.try_out()
    except MailError as error:
        return fail(
            f"{mail.smtp}: {error.detail}", "check mail.smtp, mail.security, the password and mail.ca_file"
        )
    except (OSError, ValueError) as error:
        return fail(f"mail: {error}", "give readable files")
    return ok(f"{mail.smtp} takes our connection ({mail.security})")
