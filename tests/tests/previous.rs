//! A center and an AP of different builds: this one and an earlier one, whose command line and relays
//! take part, too.
//!
//! The other builds are not made here, so this runs only when it is asked for, with their programs in
//! `GODWIT_PREVIOUS`, one or several, as `PATH` is written. As root, from the root of the repository, for
//! the last commit that spoke each protocol (1 to 5):
//!
//! ```sh
//! for c in 7780577 f228b30 b051ebf f95ae04 9df9269; do
//!     git worktree add --detach /tmp/previous/$c $c
//!     (cd /tmp/previous/$c && cargo build --locked -p godwit --target-dir /tmp/previous/target)
//!     cp /tmp/previous/target/debug/godwit /tmp/previous/godwit-$c
//!     git worktree remove --force /tmp/previous/$c
//! done
//! cargo build --workspace --all-targets
//! export GODWIT_PREVIOUS=$(ls /tmp/previous/godwit-* | paste -sd:)
//! cargo nextest run --workspace -E 'binary(previous)' --run-ignored all
//! ```
//!
//! What they send is recorded, and tested always, in `godwit-site`, `godwit-cloud` and
//! `godwit-migrate`.

use std::path::Path;

use godwit_tests::{Cloud, Daemon, Setup};

/// A machine moves to the AP and back, is docked there, and its substrate comes to the center.
fn works(cloud: &Cloud) {
    cloud.bring_substrate();
    let _ = cloud.ok(&["vm", "activate", "base", "--name", "work", "--site", "center"]);
    let mut lines = cloud.guest("work").intact(0);
    for site in ["cafe", "center", "cafe"] {
        let _ = cloud.ok(&["vm", "migrate", "work", "--to", site]);
        cloud.runs_at("work", site);
        lines = cloud.guest("work").intact(lines);
    }
    let _ = cloud.ok(&["vm", "dock", "work", "--name", "after"]);
    let _ = cloud.ok(&["vm", "activate", "after", "--name", "again", "--site", "center"]);
    let _ = cloud.guest("again").intact(lines);
    let _ = cloud.ok(&["vm", "stop", "--force", "again"]);
    let _ = cloud.ok(&["vm", "delete", "again"]);
}

/// An earlier command line is answered, whichever the center is.
fn works_by_command_line(cloud: &Cloud, previous: &Path) {
    let by = |args: &[&str]| cloud.ok_by(previous, args);
    let _ = by(&["vm", "activate", "base", "--name", "asked", "--site", "center"]);
    let _ = by(&["vm", "migrate", "asked", "--to", "cafe"]);
    assert_eq!(by(&["vm", "get", "asked"])["site"], "cafe");
    assert!(by(&["site", "list"]).as_array().is_some_and(|sites| sites.len() == 2));
    assert!(by(&["op", "list"]).as_array().is_some_and(|ops| !ops.is_empty()));
    let _ = by(&["vm", "delete", "asked"]);
}

/// A cloud of which one daemon is, in turn, of each of the earlier builds.
#[expect(clippy::print_stderr, reason = "seen when the test fails: with which build")]
fn works_beside_each_earlier(which: Daemon) {
    let all = std::env::var_os("GODWIT_PREVIOUS").expect("GODWIT_PREVIOUS names programs");
    for previous in std::env::split_paths(&all) {
        assert!(previous.exists(), "there is no {}", previous.display());
        eprintln!("{} is the {which:?}", previous.display());
        let cloud = Setup::new().other_build(which, &previous).start();
        works(&cloud);
        works_by_command_line(&cloud, &previous);
    }
}

#[test]
#[ignore = "needs programs of earlier builds"]
fn an_earlier_ap_works_beside_this_center() {
    works_beside_each_earlier(Daemon::Ap);
}

#[test]
#[ignore = "needs programs of earlier builds"]
fn an_earlier_center_works_beside_this_ap() {
    works_beside_each_earlier(Daemon::Center);
}
