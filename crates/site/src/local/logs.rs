//! Logs of QEMUs and relays, kept from filling the disk: a guest can make its QEMU complain without
//! end, and a peer its relay.
//!
//! All that lies in the run directories is looked at, whether its writer was started by this daemon,
//! adopted, or answers nobody.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use godwit_qemu::bound_log;

use super::LocalSite;

/// How often they are looked at. What is written meanwhile stays until then.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Bounds the logs for as long as the site is there.
pub(super) fn start(site: &Arc<LocalSite>) {
    let site = Arc::downgrade(site);
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let Some(run) = site.upgrade().map(|s| s.parts.dirs.run.clone()) else { return };
            if let Err(error) = tokio::task::spawn_blocking(move || bound_below(&run)).await {
                tracing::error!(%error, "bounding logs");
            }
        }
    });
}

/// Bounds every log one directory below `run`.
fn bound_below(run: &Path) {
    for dir in std::fs::read_dir(run).into_iter().flatten().flatten() {
        for name in ["qemu.log", "console.log", "relay.log"] {
            let log = dir.path().join(name);
            match bound_log(&log) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                // What is no directory has no log.
                Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => {}
                Err(error) => {
                    tracing::warn!(log = %log.display(), %error, "a log cannot be bounded");
                }
                Ok(()) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn every_log_is_bounded_and_its_writer_goes_on() {
        let run = tempfile::tempdir().expect("dir");
        std::fs::write(run.path().join("no-directory"), "").expect("file");
        let logs = ["vm/qemu.log", "vm/console.log", "wait-1/qemu.log", "mig-1/relay.log"];
        for log in logs {
            let log = run.path().join(log);
            std::fs::create_dir_all(log.parent().expect("dir")).expect("dir");
            let mut file =
                std::fs::File::options().create(true).append(true).open(&log).expect("opened");
            for _ in 0..3 {
                file.write_all(&vec![b'!'; 12 << 20]).expect("written");
                bound_below(run.path());
                let taken = std::fs::metadata(&log).expect("there").blocks() * 512;
                assert!(taken < 5 << 20, "{taken}");
            }
            file.write_all(b"its last words").expect("written");
            let text = std::fs::read(&log).expect("read");
            assert!(text.ends_with(b"its last words"));
            assert_eq!(text.len(), (36 << 20) + 14);
        }
    }
}
