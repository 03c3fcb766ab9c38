"""notify: tells by mail or syslog how a job ended. Queued by the daemon itself, one per target."""

from __future__ import annotations

import json
import os
import smtplib
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing, suppress
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import localtime, parseaddr
from functools import partial
from logging.handlers import SysLogHandler
from typing import Any
from urllib.parse import SplitResult, urlsplit

from upq import Abort, Retry, UpqJob
from upq.job import DONE
from upq.notify import Mail, Syslog, parse_target
from upq.when import duration, iso, now

SMTP_PORT, SYSLOG_PORT = 25, 514
#: Bytes of text of a syslog line, which every receiver takes.
LINE_BYTES = 900
#: Characters of the job's message in a subject.
SUBJECT_CHARACTERS = 150

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
        target = parse_target(self.jobdata["target"])
        if isinstance(target, Mail):
            self.send_mail(target.recipients)
        else:
            self.send_syslog(target)
        return True

    @property
    def timeout_s(self) -> float:
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
        with closing(connect(*where, timeout=self.timeout_s)) as smtp:
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
        line = one_line(f"job {headline(self.job)}: {self.job['msgstr']}")
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
            sender.settimeout(self.timeout_s)
            sender.connect(path)
            sender.send(line.encode())

    def send_remote(self, address: str, line: str) -> None:
        """To `[udp://]host[:port]` as one datagram, to `tcp://host[:port]` as one line."""
        server = split(address)
        where = (server.hostname, server.port or SYSLOG_PORT)
        if server.scheme == "tcp":
            with socket.create_connection(where, self.timeout_s) as sender:
                sender.sendall(line.encode() + b"\n")
            return
        family, *_, where = socket.getaddrinfo(*where, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as sender:
            sender.sendto(line.encode(), where)


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
    return f"{job['jobid']} {job['jobname']} {job['state']}"


def compose(job: Job, sender: str, recipients: tuple[str, ...], number: int) -> EmailMessage:
    """The mail about a job; a second delivery after a crash has the same Message-ID."""
    host = socket.gethostname()
    mail = EmailMessage()
    happened = f"[upq] {job['jobname']} {job['jobid']} {job['state']} on {host}"
    mail["Subject"] = one_line(f"{happened}: {job['msgstr'][:SUBJECT_CHARACTERS]}".rstrip(": "))
    mail["From"] = sender
    mail["To"] = ", ".join(recipients)
    mail["Date"] = localtime()
    mail["Message-ID"] = f"<upq.{job['jobid']}.{number}.{job['ended_at']}@{host}>"
    mail["Auto-Submitted"] = "auto-generated"
    mail.set_content("\n".join(map(one_line, body(job, host))) + "\n")
    return mail


def body(job: Job, host: str) -> Iterator[str]:
    yield f"Job {headline(job)} on {host}"
    yield ""
    yield from lines(job["msgstr"])
    yield ""
    facts = {
        "params": json.dumps(job["jobdata"], ensure_ascii=False, default=str),
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
