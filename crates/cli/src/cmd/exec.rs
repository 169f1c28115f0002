//! Programs in a guest.

use std::borrow::Cow;
use std::io::{IsTerminal, Read};
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use clap::Args;
use godwit_cloud::api::{Encoding, ExecReply, ExecRequest, MAX_INPUT};
use godwit_types::Code;
use reqwest::Method;
use serde_json::json;
use tokio::time::Instant;

use crate::args::Named;
use crate::client::Client;
use crate::failure::{Failure, Outcome, Result};
use crate::interrupt::Interrupt;
use crate::out::{self, Format};

/// How long the center is asked to wait at once, in seconds.
const SLICE_S: u64 = 30;

/// The pause before a center that went away is asked again.
const AGAIN: Duration = Duration::from_millis(250);

/// `godwit vm exec`.
#[derive(Debug, Args)]
#[command(
    after_help = "The exit code is the program's own (128 + n when signal n ended it). A failure of \
                  Godwit's has a line 'error: ...' and a code of Godwit's."
)]
pub(crate) struct Exec {
    /// Name or id
    vm: Named,
    /// Seconds to wait for its end; it is not ended when it takes longer
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    within: u32,
    /// Pass standard input on to the program, at most 16 MiB
    #[arg(long, short)]
    input: bool,
    /// Wait for the result of a program that an earlier call left running
    #[arg(long, value_name = "PID", conflicts_with_all = ["program", "input"])]
    pid: Option<u64>,
    /// Path of the program in the guest, and its arguments
    #[arg(required_unless_present = "pid", trailing_var_arg = true, allow_hyphen_values = true)]
    program: Vec<String>,
}

impl Exec {
    pub(crate) async fn run(self, client: &Client, format: Format) -> Result {
        let vm = self.vm;
        let until = Instant::now() + Duration::from_secs(u64::from(self.within));
        let mut interrupt = Interrupt::listen()?;
        let pid = match self.pid {
            Some(pid) => pid,
            None => {
                let input = if self.input { standard_input(std::io::stdin())? } else { Vec::new() };
                let mut words = self.program.into_iter();
                let program = ExecRequest {
                    path: words.next().unwrap_or_default(),
                    args: words.collect(),
                    input: BASE64_STANDARD.encode(input),
                    encoding: Encoding::Base64,
                    within_s: Some(self.within),
                    detach: true,
                };
                let path = format!("/v1/vms/{vm}/exec", vm = vm.path());
                let started = client.ask::<_, ExecReply>(Method::POST, &path, Some(&program));
                tokio::select! {
                    started = started => started?.pid,
                    () = interrupt.pressed() => {
                        return Err(Failure::new(
                            Code::Cancelled,
                            "no longer waiting; whether the program was started is not known",
                        )
                        .hint(format!("look for it in the guest: godwit vm exec {vm} /bin/ps")));
                    }
                }
            }
        };
        let wait_on = format!("wait on for its result with: godwit vm exec {vm} --pid {pid}");
        let done = tokio::select! {
            done = result(client, &vm, pid, until) => match done {
                Err(f) if f.exit == Code::TimedOut.exit_code() => {
                    return Err(Failure::new(Code::TimedOut, format!(
                        "the program has not ended within {} s; it still runs in the guest (pid {pid})",
                        self.within
                    )).hint(wait_on));
                }
                done => done?,
            },
            () = interrupt.pressed() => {
                let words = format!("no longer waiting; the program still runs in the guest (pid {pid})");
                return Err(Failure::new(Code::Cancelled, words).hint(wait_on));
            }
        };
        let (stdout, stderr) = (decoded(&done.stdout)?, decoded(&done.stderr)?);
        if matches!(format, Format::Json | Format::Yaml) {
            out::value(format, &reply_data(&done, &stdout, &stderr))?;
        } else {
            out::bytes(&shown(&stdout, std::io::stdout().is_terminal()))?;
            out::talk_bytes(&shown(&stderr, std::io::stderr().is_terminal()));
        }
        if done.truncated {
            out::notice(
                "warning: the output is cut: of each kind the guest's agent keeps the first 16 MiB; \
                 for more, write it into a file in the guest",
            );
        }
        match (done.exit, done.signal) {
            (Some(0), _) => Ok(Outcome::Done),
            (Some(code), _) => Ok(Outcome::Exit(u8::try_from(code).unwrap_or(u8::MAX))),
            (None, signal) => {
                let signal = signal.unwrap_or(0);
                out::notice(&format!("the program was ended by signal {signal}"));
                Ok(Outcome::Exit(u8::try_from(128 + signal).unwrap_or(u8::MAX)))
            }
        }
    }
}

/// Asks for a program's result until it is there, also when the center goes away meanwhile.
async fn result(client: &Client, vm: &Named, pid: u64, until: Instant) -> Result<ExecReply> {
    loop {
        // Rounded up: a whole second is the shortest that can be asked for.
        let left = (until.saturating_duration_since(Instant::now()) + Duration::from_millis(999))
            .as_secs();
        let path = format!(
            "/v1/vms/{vm}/exec/{pid}?encoding=base64&within_s={}",
            left.min(SLICE_S),
            vm = vm.path()
        );
        match client.get(&path).await {
            Err(f) if left == 0 => return Err(f),
            Err(f) if f.exit == Code::TimedOut.exit_code() => {}
            Err(f) if f.away => tokio::time::sleep(AGAIN).await,
            done => return done,
        }
    }
}

/// All of standard input, if the guest's agent takes so much.
fn standard_input(from: impl Read) -> Result<Vec<u8>> {
    let mut input = Vec::new();
    from.take(MAX_INPUT as u64 + 1)
        .read_to_end(&mut input)
        .map_err(|e| Failure::internal(format!("reading standard input: {e}")))?;
    if input.len() > MAX_INPUT {
        return Err(Failure::usage(
            "standard input is longer than the 16 MiB that a guest is given",
        )
        .hint("give it in parts: ... | godwit vm exec -i VM -- sh -c 'cat >>FILE'"));
    }
    Ok(input)
}

fn decoded(text: &str) -> Result<Vec<u8>> {
    BASE64_STANDARD
        .decode(text)
        .map_err(|e| Failure::internal(format!("the program's output is not understood: {e}")))
}

/// As data: text, and the bytes in base64 where they are no text.
fn reply_data(done: &ExecReply, stdout: &[u8], stderr: &[u8]) -> serde_json::Value {
    let mut all = json!({ "pid": done.pid, "exit": done.exit, "signal": done.signal,
        "truncated": done.truncated });
    for (key, bytes, base64) in [("stdout", stdout, &done.stdout), ("stderr", stderr, &done.stderr)]
    {
        let text = String::from_utf8_lossy(bytes);
        if matches!(text, Cow::Owned(_)) {
            all[format!("{key}_base64")] = json!(base64);
        }
        all[key] = json!(text);
    }
    all
}

/// What a guest's program wrote: as it is for a file or a program, without control over a
/// terminal.
pub(super) fn shown(bytes: &[u8], on_terminal: bool) -> Cow<'_, [u8]> {
    if on_terminal {
        out::plain(&String::from_utf8_lossy(bytes).replace('\r', "")).into_bytes().into()
    } else {
        bytes.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_does_not_steer_the_terminal() {
        assert_eq!(&*shown(b"a\x1b[2J\r\n", true), b"a\\u{1b}[2J\n");
        assert_eq!(&*shown(b"a\x1b[2J\r\n\xff", false), b"a\x1b[2J\r\n\xff");
    }

    #[test]
    fn input_is_read_whole_or_refused() {
        let bytes = vec![0xff; MAX_INPUT];
        assert_eq!(standard_input(&bytes[..]).expect("fits").len(), MAX_INPUT);
        let refused = standard_input(bytes[..].chain(&b"x"[..])).expect_err("too long");
        assert_eq!(refused.exit, 2);
        assert!(refused.words().contains("longer than the 16 MiB"), "{}", refused.words());
    }

    #[test]
    fn what_is_no_text_is_given_in_base64_too() {
        let reply =
            ExecReply { stdout: "/w==".into(), stderr: "YQ==".into(), ..ExecReply::default() };
        let all = reply_data(&reply, b"\xff", b"a");
        assert_eq!((&all["stdout_base64"], &all["stderr"]), (&json!("/w=="), &json!("a")));
        assert!(all.get("stderr_base64").is_none());
    }
}
