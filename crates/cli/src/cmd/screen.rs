//! What a user sees of a machine: console, screen, keyboard.

use std::io::{IsTerminal, Read};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;

use clap::Args;
use godwit_cloud::api::TypeText;
use godwit_site::ConsoleTail;
use reqwest::Method;
use reqwest::header::{CONNECTION, UPGRADE};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::exec::shown;
use super::vm::OPEN_WITHIN;
use crate::args::Named;
use crate::client::Client;
use crate::failure::{Failure, Outcome, Result};
use crate::interrupt::Interrupt;
use crate::out::{self, Format};

/// Ctrl-] leaves the console, as with telnet and virsh.
const LEAVE: u8 = 0x1d;

/// `godwit vm console`.
#[derive(Debug, Args)]
pub(crate) struct Console {
    /// Name or id
    vm: Named,
    /// Print the last BYTES of its log instead of attaching (16 KiB when no number is given)
    #[arg(long, value_name = "BYTES", num_args = 0..=1, default_missing_value = "16384")]
    tail: Option<u32>,
}

impl Console {
    pub(crate) async fn run(self, client: &Client, format: Format) -> Result {
        let stdin = std::io::stdin();
        let attach = self.tail.is_none() && stdin.is_terminal() && std::io::stdout().is_terminal();
        if !attach {
            let max = self.tail.unwrap_or(16 << 10);
            let path = format!("/v1/vms/{}/console?max_bytes={max}", self.vm.path());
            let tail: ConsoleTail = client.get(&path).await?;
            match format {
                Format::Json | Format::Yaml => out::value(format, &tail)?,
                _ => {
                    let text = shown(tail.text.as_bytes(), std::io::stdout().is_terminal());
                    out::bytes(&text)?;
                }
            }
            return Ok(Outcome::Done);
        }
        let mut guest = open(client, &self.vm, "attach", "console").await?;
        let left = self.attached(&mut guest).await;
        // The guest's line has no end where it is left.
        out::notice("");
        left
    }

    /// Carries keys and characters until the user leaves or the guest hangs up.
    async fn attached(&self, guest: &mut reqwest::Upgraded) -> Result {
        let _raw = Raw::enter()?;
        // Not before the keys are the guest's: one typed at these words would be lost. A raw terminal
        // wants its carriage return.
        out::notice(&format!("console of {}; Ctrl-] leaves\r", self.vm));
        let (mut user, mut screen) = (tokio::io::stdin(), tokio::io::stdout());
        let (mut typed, mut shown) = ([0u8; 256], vec![0u8; 16 << 10]);
        loop {
            tokio::select! {
                n = user.read(&mut typed) => {
                    let n = n.map_err(|e| Failure::internal(format!("reading the keyboard: {e}")))?;
                    let end = typed[..n].iter().position(|b| *b == LEAVE);
                    let keep = end.unwrap_or(n);
                    guest.write_all(&typed[..keep]).await.map_err(ended)?;
                    if n == 0 || end.is_some() {
                        return Ok(Outcome::Done);
                    }
                }
                n = guest.read(&mut shown) => {
                    let n = n.map_err(ended)?;
                    if n == 0 {
                        return Ok(Outcome::Done);
                    }
                    screen.write_all(&shown[..n]).await.map_err(ended)?;
                    screen.flush().await.map_err(ended)?;
                }
            }
        }
    }
}

fn ended(e: std::io::Error) -> Failure {
    Failure::unavailable(format!("the console broke off: {e}"))
}

/// The terminal in raw mode, put back at the end.
struct Raw(Termios);

impl Raw {
    fn enter() -> Result<Self> {
        let stdin = std::io::stdin();
        let failed = |e| Failure::internal(format!("setting up the terminal: {e}"));
        let before = tcgetattr(stdin.as_fd()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin.as_fd(), OptionalActions::Flush, &raw).map_err(failed)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing put back.
        let _ = tcsetattr(std::io::stdin().as_fd(), OptionalActions::Flush, &self.0);
    }
}

async fn open(
    client: &Client,
    vm: &Named,
    path: &str,
    protocol: &'static str,
) -> Result<reqwest::Upgraded> {
    let request = client
        .request(Method::GET, &format!("/v1/vms/{vm}/{path}", vm = vm.path()))
        .header(CONNECTION, "upgrade")
        .header(UPGRADE, protocol);
    let answer = tokio::time::timeout(OPEN_WITHIN, client.send(request))
        .await
        .map_err(|_| Failure::unavailable(format!("no answer from {}", client.base())))??;
    answer.upgrade().await.map_err(|e| client.broken(&e))
}

/// `godwit vm screenshot`.
#[derive(Debug, Args)]
pub(crate) struct Screenshot {
    /// Name or id
    vm: Named,
    /// The file to write; `-` for stdout [default: <VM>.png]
    file: Option<PathBuf>,
}

impl Screenshot {
    pub(crate) async fn run(self, client: &Client) -> Result {
        let request =
            client.request(Method::GET, &format!("/v1/vms/{}/screenshot", self.vm.path()));
        let answer = client.send(request).await?;
        let png = client.body(answer).await?;
        let file = self.file.unwrap_or_else(|| PathBuf::from(format!("{}.png", self.vm)));
        if file.as_os_str() == "-" {
            if std::io::stdout().is_terminal() {
                return Err(Failure::usage("a picture is not for a terminal").hint("name a file"));
            }
            out::bytes(&png)?;
        } else {
            std::fs::write(&file, &png)
                .map_err(|e| Failure::internal(format!("writing {}: {e}", file.display())))?;
            out::line(&file.display().to_string())?;
        }
        Ok(Outcome::Done)
    }
}

/// `godwit vm type`.
#[derive(Debug, Args)]
pub(crate) struct Type {
    /// Name or id
    vm: Named,
    /// The text; `-` reads it from stdin
    text: String,
    /// Press Enter after it
    #[arg(long, short)]
    enter: bool,
}

impl Type {
    pub(crate) async fn run(self, client: &Client) -> Result {
        let mut text = self.text;
        if text == "-" {
            text.clear();
            std::io::stdin()
                .take(64 << 10)
                .read_to_string(&mut text)
                .map_err(|e| Failure::usage(format!("reading the text from stdin: {e}")))?;
        }
        if self.enter {
            text.push('\n');
        }
        let path = format!("/v1/vms/{}/type", self.vm.path());
        let (): () = client.ask(Method::POST, &path, Some(&TypeText { text })).await?;
        Ok(Outcome::Done)
    }
}

/// `godwit vm view`.
#[derive(Debug, Args)]
pub(crate) struct View {
    /// Name or id
    vm: Named,
    /// Where viewers of this machine connect
    #[arg(long, default_value = "127.0.0.1:0", value_name = "ADDR:PORT")]
    listen: SocketAddr,
    /// Start this viewer, e.g. `vncviewer`; it gets HOST::PORT as its argument
    #[arg(long, env = "GODWIT_VIEWER", hide_env_values = true, value_name = "PROGRAM")]
    viewer: Option<String>,
}

impl View {
    pub(crate) async fn run(self, client: &Client) -> Result {
        if !self.listen.ip().is_loopback() {
            return Err(Failure::usage("the display is offered on this machine only")
                .hint("name an address of 127.0.0.0/8 or ::1; go through ssh from elsewhere"));
        }
        // Whether the machine has a display is asked before a viewer is told to come.
        let mut next = Some(open(client, &self.vm, "view", "rfb").await?);
        let listener = tokio::net::TcpListener::bind(self.listen)
            .await
            .map_err(|e| Failure::unavailable(format!("listening on {}: {e}", self.listen)))?;
        let at = listener
            .local_addr()
            .map_err(|e| Failure::internal(format!("listening on {}: {e}", self.listen)))?;
        let mut interrupt = Interrupt::listen()?;
        out::line(&format!("vnc://{at}"))?;
        let mut viewer = match &self.viewer {
            Some(program) => Some(
                tokio::process::Command::new(program)
                    .arg(format!("{}::{}", at.ip(), at.port()))
                    .spawn()
                    .map_err(|e| Failure::unavailable(format!("starting {program}: {e}")))?,
            ),
            None => {
                out::notice("point a VNC viewer there; Ctrl-C ends");
                None
            }
        };
        loop {
            let gone = async {
                match &mut viewer {
                    Some(v) => v.wait().await.map(|_| ()),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = interrupt.pressed() => return Ok(Outcome::Done),
                _ = gone => return Ok(Outcome::Done),
                user = listener.accept() => {
                    let (mut user, _) = user
                        .map_err(|e| Failure::internal(format!("taking a viewer in: {e}")))?;
                    let mut display = match next.take() {
                        Some(d) => d,
                        None => open(client, &self.vm, "view", "rfb").await?,
                    };
                    tokio::spawn(async move {
                        // Either end may hang up; that is how a session ends.
                        let _ = tokio::io::copy_bidirectional(&mut user, &mut display).await;
                    });
                }
            }
        }
    }
}
