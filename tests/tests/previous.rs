//! A center and an AP of different builds: this one, and that of the release before.
//!
//! The other build is not made here, so this runs only when it is asked for, with the program of
//! the release before in `GODWIT_PREVIOUS`:
//! `GODWIT_PREVIOUS=/path/to/godwit cargo nextest run -E 'binary(previous)' --run-ignored all`.
//! What the release before sends is recorded, and tested always, in `godwit-site`, `godwit-cloud` and
//! `godwit-migrate`.

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

#[test]
#[ignore = "needs the program of the release before"]
fn the_release_before_works_beside_this_one_at_either_end() {
    let previous = std::env::var_os("GODWIT_PREVIOUS").expect("GODWIT_PREVIOUS names a program");
    for which in [Daemon::Ap, Daemon::Center] {
        let cloud = Setup::new().other_build(which, &previous).start();
        works(&cloud);
        // And its command line, whichever the center is.
        let by = |args: &[&str]| cloud.ok_by(&previous, args);
        let _ = by(&["vm", "activate", "base", "--name", "asked", "--site", "center"]);
        let _ = by(&["vm", "migrate", "asked", "--to", "cafe"]);
        assert_eq!(by(&["vm", "get", "asked"])["site"], "cafe");
        assert!(by(&["site", "list"]).as_array().is_some_and(|sites| sites.len() == 2));
        assert!(by(&["op", "list"]).as_array().is_some_and(|ops| !ops.is_empty()));
        let _ = by(&["vm", "delete", "asked"]);
    }
}
