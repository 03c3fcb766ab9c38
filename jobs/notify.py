"""notify: tells how a job ended: by mail, syslog, webhook, or any service that apprise knows.

Queued by the daemon itself, one per target.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import smtplib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import localtime, parseaddr
from functools import partial
from logging.handlers import SysLogHandler
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from upq import Abort, Retry, UpqJob, __version__, webhook
from upq.job import DONE
from upq.notify import (
    TARGET_URL,
    Mail,
    Service,
    Syslog,
    Webhook,
    library,
    parse_target,
    scrub,
    shown_target,
)
from upq.when import duration, iso, now

SMTP_PORT, SYSLOG_PORT = 25, 514
#: Bytes of text of a syslog line, which every receiver takes.
LINE_BYTES = 900
#: Characters of the job's message in a subject, and of what a service is told.
SUBJECT_CHARACTERS, SERVICE_CHARACTERS = 150, 4000

Job = dict[str, Any]
Refused = dict[str, tuple[int, bytes]]


class Notify(UpqJob):
    def check(self) -> bool:
        # What is asked before it has a row was not queued by the daemon: no mail relay for clients.
        if self.jobid < 0 or "job" not in self.jobdata:
            self.msg("notify is queued by the daemon itself")
            return False
        return True

    def run(self) -> bool:
        self.job: Job = self.jobdata["job"]
        target = parse_target(self.jobdata.get(TARGET_URL) or self.jobdata["target"])
        if isinstance(target, Mail):
            self.send_mail(target.recipients)
        elif isinstance(target, Syslog):
            self.send_syslog(target)
        elif isinstance(target, Webhook):
            self.send_webhook(target.url)
        else:
            self.send_service(target)
        return True

    @property
    def mail_timeout_s(self) -> float:
        return duration(self.getcfg("mail_timeout_s", "10"))

    # Mail

    def send_mail(self, recipients: tuple[str, ...]) -> None:
        """Give it to the server; whoever it refused for now is tried again, the others are not."""
        sender = one_line(
            self.getcfg("from") or self.getcfg("mail_from") or f"upq@{socket.getfqdn()}"
        )
        mail = compose(self.job, sender, recipients, self.jobid).as_bytes(policy=SMTP)
        try:
            refused = self.deliver(parseaddr(sender)[1], recipients, mail)
        except smtplib.SMTPRecipientsRefused as error:
            # Nobody got it, not even those the server was not asked about any more.
            refused = dict.fromkeys(recipients, (421, b"not asked")) | error.recipients
        except (smtplib.SMTPException, OSError) as error:
            raise judged(error) from error
        self.settle(recipients, refused)

    def deliver(self, sender: str, recipients: tuple[str, ...], mail: bytes) -> Refused:
        """One conversation with the server; returns those of several recipients it refused."""
        tls = self.getcfg("mail_tls") or "none"
        server = split(self.getcfg("mail_server") or "localhost")
        context = None if tls == "none" else ssl.create_default_context()
        connect = partial(smtplib.SMTP_SSL, context=context) if tls == "tls" else smtplib.SMTP
        where = (server.hostname, server.port or SMTP_PORT)
        with closing(connect(*where, timeout=self.mail_timeout_s)) as smtp:
            if tls == "starttls":
                smtp.starttls(context=context)
            if user := self.getcfg("mail_user"):
                smtp.login(user, self.getcfg("mail_password", ""))
            refused = smtp.sendmail(sender, recipients, mail)
            with suppress(smtplib.SMTPException, OSError):  # it is sent, whatever comes now
                smtp.quit()
        return refused

    def settle(self, recipients: tuple[str, ...], refused: Refused) -> None:
        """Leave in jobdata what another attempt has to do, and say who got it and who did not."""
        later = [name for name, (code, _) in refused.items() if code < 500]
        told = {name: f"{name} refused: {reply(*answer)}" for name, answer in refused.items()}
        never = self.jobdata.setdefault("refused", {})
        never.update((name, text) for name, text in told.items() if name not in later)
        sent = ", ".join(name for name in recipients if name not in refused)
        text = "; ".join([*([f"sent to {sent}"] if sent else []), *(never | told).values()])
        if later:
            self.jobdata["target"] = "mail:" + ",".join(later)
            raise Retry(text)
        if never:
            raise Abort(text)
        self.msg(text)

    # Syslog

    def send_syslog(self, target: Syslog) -> None:
        level = target.level or ("info" if self.job["state"] == DONE else "err")
        priority = (
            SysLogHandler.facility_names[target.facility] * 8 + SysLogHandler.priority_names[level]
        )
        job = "" if "news" in self.job else "job "
        line = one_line(f"{job}{headline(self.job)}: {self.job['msgstr']}")
        line = line.encode()[:LINE_BYTES].decode(errors="ignore")
        address = self.getcfg("syslog_address") or "/dev/log"
        try:
            if address.startswith("/"):
                self.send_local(address, f"<{priority}>upq[{os.getpid()}]: {line}")
            else:
                host = f"{iso(now())} {socket.gethostname()}"
                self.send_remote(address, f"<{priority}>1 {host} upq {os.getpid()} - - {line}")
        except OSError as error:
            raise Retry(f"syslog {address}: {error}") from error
        self.msg(f"sent to syslog {address}")

    def send_local(self, path: str, line: str) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(self.mail_timeout_s)
            sender.connect(path)
            sender.send(line.encode())

    def send_remote(self, address: str, line: str) -> None:
        """To `[udp://]host[:port]` as one datagram, to `tcp://host[:port]` as one line."""
        server = split(address)
        where = (server.hostname, server.port or SYSLOG_PORT)
        if server.scheme == "tcp":
            with socket.create_connection(where, self.mail_timeout_s) as sender:
                sender.sendall(line.encode() + b"\n")
            return
        family, *_, where = socket.getaddrinfo(*where, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as sender:
            sender.sendto(line.encode(), where)

    # Webhooks

    def send_webhook(self, url: str) -> None:
        """POST the job as JSON; whether it is tried again is up to the status of the answer."""
        shown = shown_target(f"webhook:{url}")
        body = json.dumps(self.job).encode()
        at = int(time.time())
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"upq/{__version__}",
            "X-Upq-Event": self.job.get("event") or self.job["state"],
            "X-Upq-Delivery": str(self.jobid),
            "X-Upq-Timestamp": str(at),
        }
        if secret := self.getcfg("webhook_secret"):
            headers["X-Upq-Signature"] = webhook.signature(secret, at, body)
        try:
            answer = webhook.post(
                url,
                body,
                headers,
                allow=webhook.networks(self.getcfg("webhook_allow") or ""),
                timeout_s=duration(self.getcfg("webhook_timeout_s") or "10"),
            )
        except webhook.Forbidden as error:
            raise Abort(f"{shown}: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            raise Retry(f"{shown}: {one_line(str(error) or type(error).__name__)}") from error
        if answer.is_final:
            raise Abort(f"{shown}: refused with status {answer.status}")
        if not answer.is_well:
            raise Retry(f"{shown}: status {answer.status}", after=answer.retry_after_s)
        self.msg(f"sent to {shown}")

    # All else

    def send_service(self, service: Service) -> None:
        """Have the notification library tell it. Why it could not is said without the URL."""
        shown = shown_target(service.url)
        try:
            apprise = library()
        except ImportError as error:
            raise Retry(f"{shown}: needs the extra `notify`: pip install 'upq[notify]'") from error
        with Overheard() as heard:
            try:
                to = apprise.Apprise.instantiate(service.url, suppress_exceptions=True)
                if to is None:
                    raise Abort(f"{shown}: the notification library (apprise) cannot read this URL")
                host = socket.gethostname()
                text = "\n".join(map(one_line, body(self.job, host)))[:SERVICE_CHARACTERS]
                kind = "success" if self.job["state"] == DONE else "failure"
                sent = to.notify(body=text, title=subject(self.job, host), notify_type=kind)
            except (Abort, Retry):
                raise
            except Exception as error:
                sent, heard.words = False, [*heard.words, f"{type(error).__name__}: {error}"]
        if not sent:
            why = scrub(one_line(" ".join(heard.words)), pieces(service.url))
            raise Retry(f"{shown}: not delivered. {why}".strip())
        self.msg(f"sent to {shown}")


class Overheard(logging.Handler):
    """What the notification library warns of in this thread, while the block runs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.words: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self.words.append(record.getMessage())

    def hush(self, record: logging.LogRecord) -> bool:
        return record.thread != self._thread

    def __enter__(self) -> Overheard:
        logging.getLogger("apprise").addHandler(self)
        # It names the paths that it asks for, in lines for debugging.
        logging.getLogger("urllib3.connectionpool").addFilter(self.hush)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("apprise").removeHandler(self)
        logging.getLogger("urllib3.connectionpool").removeFilter(self.hush)


def pieces(url: str) -> list[str]:
    """All of a URL that may be a secret, the longest first."""
    rest = url.partition("://")[2]
    words = {rest, unquote(rest), *re.split(r"[/?&=:@,+#%]+", f"{rest}/{unquote(rest)}")}
    return sorted((word for word in words if len(word) > 2), key=len, reverse=True)


def split(address: str) -> SplitResult:
    return urlsplit(address if "//" in address else f"//{address}")


def one_line(text: str) -> str:
    r"""The text with everything that would break a line or a header written as \n or \u2028."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def reply(code: int, text: bytes | str) -> str:
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    return one_line(f"{code} {text}")


def judged(error: Exception) -> Abort | Retry:
    """Whether the server may take it another time."""
    code = getattr(error, "smtp_code", 0)
    text = reply(code, error.smtp_error) if code else one_line(str(error))
    lasting = code >= 500 or isinstance(error, smtplib.SMTPNotSupportedError)
    return (Abort if lasting else Retry)(f"mail server: {text}")


def headline(job: Job) -> str:
    if "news" in job:
        return f"{job['jobname']}: {job['news']}"
    return f"{job['jobid']} {job['jobname']} {job['state']}"


def subject(job: Job, host: str) -> str:
    """One line; what belongs to one group begins alike."""
    if "news" in job:
        happened = f"[upq] {headline(job)}"
    else:
        happened = f"[upq] {job['jobname']} {job['jobid']} {job['state']} on {host}"
    return one_line(f"{happened}: {job['msgstr'][:SUBJECT_CHARACTERS]}".rstrip(": "))


def compose(job: Job, sender: str, recipients: tuple[str, ...], number: int) -> EmailMessage:
    """The mail about a job; a second delivery after a crash has the same Message-ID."""
    host = socket.gethostname()
    mail = EmailMessage()
    mail["Subject"] = subject(job, host)
    mail["From"] = sender
    mail["To"] = ", ".join(recipients)
    mail["Date"] = localtime()
    mail["Message-ID"] = f"<upq.{job['jobid']}.{number}.{job['ended_at']}@{host}>"
    if thread := job.get("thread"):
        # Of no mail: all that refer to it are shown as one talk.
        mail["In-Reply-To"] = mail["References"] = one_line(f"<{thread}.thread@upq>")
    mail["Auto-Submitted"] = "auto-generated"
    mail.set_content("\n".join(map(one_line, body(job, host))) + "\n")
    return mail


def body(job: Job, host: str) -> Iterator[str]:
    yield f"{headline(job)}, on {host}" if "news" in job else f"Job {headline(job)} on {host}"
    yield ""
    if job.get("event") in ("alert", "alert_over"):
        yield "All that waits:   upq-cli queues"
        yield f"All that failed:  upq-cli jobs state:failed type:{job['jobname']}"
        return
    if job.get("event") == "digest":
        yield f"The first failed at {iso(job['first_at'])}, the last at {iso(job['last_at'])}."
        yield f"The latest are {', '.join(map(str, job['ids']))}; the last said:"
        yield ""
    yield from lines(job["msgstr"])
    yield ""
    if job.get("event") == "digest":
        yield f"Try it again:     upq-cli retry {job['jobid']}"
        yield f"All about it:     upq-cli show {job['jobid']}"
        yield f"All that failed:  upq-cli jobs state:failed type:{job['jobname']}"
        return
    facts = {
        "params": json.dumps(job.get("params", job["jobdata"]), ensure_ascii=False, default=str),
        "result": json.dumps(job["result"], ensure_ascii=False, default=str),
        "queue": job["queue"],
        "submitter": job["submitter"],
        "attempts": job["retries"] + 1,
        **{
            name: iso(job[f"{name}_at"])
            for name in ("created", "started", "ended")
            if job[f"{name}_at"]
        },
    }
    for name, value in facts.items():
        yield f"{name + ':':<11} {value}"
    if job["output"]:
        yield from ("", "The end of its output:", *lines(job["output"]))
    yield ""
    if job["state"] != DONE:
        yield f"Try it again:   upq-cli retry {job['jobid']}"
    yield f"All about it:   upq-cli show {job['jobid']}"


def lines(text: str) -> list[str]:
    return [line.expandtabs() for line in text.splitlines()]
