//! The socket by which root on the center's host gets a token for the API, when nobody has one any
//! more, or to give a program one of its own.
//!
//! ```text
//! client: {"role":...,"lifetime_s":...} newline     daemon: asks the kernel who that is (SO_PEERCRED)
//!         <- {"Ok": token} or {"Err": fault}
//! ```

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use godwit_types::{Code, Fault};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use crate::access::Principal;
use crate::controller::{ApiToken, Controller, NewApiToken};

/// The longest request and answer, in bytes.
const MAX_LINE: u64 = 4 << 10;

/// How long either side may take.
const WITHIN: Duration = Duration::from_secs(5);

/// The socket of the center whose directory of sockets is `run`.
#[must_use]
pub fn local_socket(run: &Path) -> PathBuf {
    run.join("admin.sock")
}

fn failed(doing: &str, path: &Path, e: &std::io::Error) -> Fault {
    Fault::unavailable(format!("{doing} {}: {e}", path.display()))
}

/// Listens; a socket that an earlier daemon left is replaced.
pub(super) fn listen(run: &Path) -> Result<UnixListener, Fault> {
    let path = local_socket(run);
    if let Err(e) = std::fs::remove_file(&path)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        return Err(failed("removing", &path, &e));
    }
    let listener = UnixListener::bind(&path).map_err(|e| failed("listening on", &path, &e))?;
    // Who else connects is turned away by the kernel already.
    let mode = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(&path, mode).map_err(|e| failed("closing to others", &path, &e))?;
    Ok(listener)
}

/// Serves one after the other: a request takes no longer than [`WITHIN`].
pub(super) async fn serve(listener: UnixListener, controller: Arc<Controller>) {
    let own = rustix::process::geteuid().as_raw();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let may = stream.peer_cred().is_ok_and(|c| c.uid() == 0 || c.uid() == own);
                let done = tokio::time::timeout(WITHIN, answer(stream, &controller, may)).await;
                if let Ok(Err(error)) = done {
                    tracing::debug!(%error, "the local socket");
                }
            }
            Err(error) => {
                tracing::warn!(%error, "the local socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer(mut stream: UnixStream, controller: &Controller, may: bool) -> std::io::Result<()> {
    let (read, mut write) = stream.split();
    let mut line = String::new();
    BufReader::new(read.take(MAX_LINE)).read_line(&mut line).await?;
    let made: Result<ApiToken, Fault> = match serde_json::from_str::<NewApiToken>(&line) {
        _ if !may => Err(Fault::new(Code::Forbidden, "only root gets a token here")),
        Err(e) => Err(Fault::invalid(format!("the request: {e}"))),
        Ok(want) => controller
            .accounts
            .token_create(&Principal::operator(), NewApiToken { user: None, ..want }),
    };
    write.write_all(&serde_json::to_vec(&made)?).await?;
    write.shutdown().await
}

/// Asks the center on this host for a token of the operator's.
///
/// # Errors
/// Unavailable when nobody listens; forbidden to anybody but root and the daemon's own user.
pub async fn local_token(socket: &Path, want: &NewApiToken) -> Result<ApiToken, Fault> {
    let ask = async {
        let mut stream = UnixStream::connect(socket).await?;
        let mut line = serde_json::to_vec(want)?;
        line.push(b'\n');
        stream.write_all(&line).await?;
        let mut answer = Vec::new();
        stream.take(MAX_LINE).read_to_end(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let hint = "is the center of this host running? another's socket: --socket";
    let answer = tokio::time::timeout(WITHIN, ask)
        .await
        .map_err(|_| Fault::unavailable(format!("no answer from {}", socket.display())).hint(hint))?
        .map_err(|e| failed("asking", socket, &e).hint(hint))?;
    serde_json::from_slice(&answer)
        .map_err(|e| Fault::unavailable(format!("the answer of {}: {e}", socket.display())))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Role;
    use crate::controller::tests::{Send, world};
    use godwit_types::UnixMs;

    #[tokio::test]
    #[allow(clippy::print_stderr, reason = "where a test says that it was left out")]
    async fn root_gets_a_token_by_the_local_socket_and_others_do_not() {
        let w = world(Send::Works).await;
        let dir = tempfile::tempdir().expect("dir");
        let socket = local_socket(dir.path());
        let nobody = local_token(&socket, &NewApiToken::default()).await.expect_err("nobody there");
        assert_eq!(nobody.code, Code::Unavailable);
        std::fs::write(&socket, "a leftover").expect("written");
        let listener = listen(dir.path()).expect("listens");
        let mode = std::fs::metadata(&socket).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let served = tokio::spawn(serve(listener, w.c.clone()));
        let want = NewApiToken { role: Some(Role::Viewer), ..NewApiToken::default() };
        let made = local_token(&socket, &want).await.expect("made");
        let who = w.c.registry().people().principal(&made.token, UnixMs::now()).expect("good");
        assert_eq!((who.user.as_str(), who.role), ("operator", Role::Viewer));
        // What the kernel says of the other side decides, also where the file would let it in.
        let open = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("mode");
        };
        open(dir.path(), 0o755);
        open(&socket, 0o666);
        let asked = std::thread::spawn(move || {
            use rustix::thread::Uid;
            use std::io::{Read, Write};
            let nobody = Uid::from_raw(65_534);
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody)?;
            let mut stream = std::os::unix::net::UnixStream::connect(&socket)?;
            stream.write_all(b"{}\n")?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).map(|_| answer)
        });
        let asked = tokio::task::spawn_blocking(|| asked.join().expect("no panic"));
        match asked.await.expect("joined") {
            Ok(answer) => {
                let answer: Result<ApiToken, Fault> =
                    serde_json::from_slice(&answer).expect("json");
                assert_eq!(answer.expect_err("refused").code, Code::Forbidden);
            }
            Err(e) => eprintln!("SKIPPED: this test is nobody else here: {e}"),
        }
        served.abort();
    }
}
