//! Programs in a guest.

use std::borrow::Cow;
use std::io::{IsTerminal, Read};

use clap::Args;
use godwit_cloud::site::{GuestOutput, GuestProgram};
use godwit_types::Name;
use reqwest::Method;

use crate::client::Client;
use crate::failure::{Failure, Outcome, Result};
use crate::out::{self, Format};

/// The longest input that is passed on, in bytes: it travels in one message.
const MAX_INPUT: u64 = 256 << 10;

/// `godwit vm exec`.
#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// Name or id
    vm: Name,
    /// Seconds that the program may take
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    within: u32,
    /// Pass standard input on to the program
    #[arg(long, short)]
    input: bool,
    /// Path of the program in the guest, and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    program: Vec<String>,
}

impl Exec {
    pub(crate) async fn run(self, client: &Client, format: Format) -> Result {
        let mut input = String::new();
        if self.input && !std::io::stdin().is_terminal() {
            std::io::stdin()
                .take(MAX_INPUT)
                .read_to_string(&mut input)
                .map_err(|e| Failure::internal(format!("reading standard input: {e}")))?;
        }
        let mut words = self.program.into_iter();
        let program = GuestProgram {
            path: words.next().unwrap_or_default(),
            args: words.collect(),
            input,
            within_s: Some(self.within),
        };
        let path = format!("/v1/vms/{}/exec", self.vm);
        let done: GuestOutput = client.ask(Method::POST, &path, Some(&program)).await?;
        if matches!(format, Format::Json | Format::Yaml) {
            out::value(format, &done)?;
        } else {
            out::bytes(shown(&done.stdout, std::io::stdout().is_terminal()).as_bytes())?;
            if !done.stderr.is_empty() {
                let words = shown(&done.stderr, std::io::stderr().is_terminal());
                out::talk(words.strip_suffix('\n').unwrap_or(&words));
            }
        }
        match done.exit {
            Some(0) => Ok(Outcome::Done),
            exit => Err(Failure::internal(match exit {
                Some(code) => format!("the program ended with exit code {code}"),
                None => "the program was ended by a signal".to_owned(),
            })),
        }
    }
}

/// What a guest's program wrote: as it is for a file or a program, without control over a
/// terminal.
pub(super) fn shown(text: &str, on_terminal: bool) -> Cow<'_, str> {
    if on_terminal { out::plain(&text.replace('\r', "")).into() } else { text.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_does_not_steer_the_terminal() {
        assert_eq!(shown("a\x1b[2J\r\n", true), "a\\u{1b}[2J\n");
        assert_eq!(shown("a\x1b[2J\r\n", false), "a\x1b[2J\r\n");
    }
}
