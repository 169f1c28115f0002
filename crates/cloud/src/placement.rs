//! The VM schedule manager (CloudAP, section III): at which site an environment is to run.
//!
//! Pure: what is known of the sites goes in, a choice or a refusal comes out. The first policy
//! asks for room first, then prefers the site that already holds the substrate (or the image),
//! then the one with more memory left for each machine it would then have, then the name.

use std::collections::BTreeMap;
use std::fmt;

use godwit_site::MACHINE_OVERHEAD_MIB;
use godwit_types::{Code, CodedError, Mib, Name, SiteKind, SiteState, SubstrateId, UnixMs};

use crate::registry::SiteRecord;

/// What is to be placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demand {
    /// Guest memory.
    pub memory: Mib,
    /// vCPUs.
    pub vcpus: u8,
    /// What it starts from.
    pub source: Source,
    /// The one site it may go to, if the user named one.
    pub only: Option<Name>,
    /// A site it must not go to: the one it leaves.
    pub not: Option<Name>,
    /// Sites that cannot have its network, and why; none for one without a network.
    pub barred: BTreeMap<Name, String>,
}

/// What an environment starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A cold boot of an image.
    Image(Name),
    /// A substrate in the pool; its image is needed beside it.
    Substrate(SubstrateId),
    /// Its running self: a migration. The image must be at the destination.
    Live(Name),
}

/// The choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// The site.
    pub site: Name,
    /// It holds the substrate or image already; otherwise that has to be brought there first.
    pub holds: bool,
}

/// Memory that a host keeps for itself, in MiB.
pub const HOST_RESERVE_MIB: u64 = 256;

/// Disk that must be left for cow files, in MiB.
pub const DISK_RESERVE_MIB: u64 = 512;

/// vCPUs that may share one processor: the paper's server holds about ten machines.
pub const VCPUS_PER_CPU: u64 = 10;

/// Why one site does not come into question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unfit {
    /// Its lease ran out.
    Unreachable,
    /// Not enough memory: needed, left.
    Memory(u64, u64),
    /// Its memory is promised to other machines: needed, left.
    Promised(u64, u64),
    /// Not enough tmpfs for the RAM file: needed, left.
    RamFiles(u64, u64),
    /// Not enough disk: needed, left.
    Disk(u64, u64),
    /// More vCPUs than its processors should carry.
    Cpus,
    /// The image is not there, and a live machine cannot wait for it.
    NoImage(Name),
    /// It cannot have the machine's network: why.
    NoNetwork(String),
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable => f.write_str("does not answer"),
            Self::Memory(n, l) => write!(f, "needs {n} MiB of memory, has {l}"),
            Self::Promised(n, l) => {
                write!(f, "needs {n} MiB of memory, has {l} that nobody is promised")
            }
            Self::RamFiles(n, l) => write!(f, "needs {n} MiB of tmpfs, has {l}"),
            Self::Disk(n, l) => write!(f, "needs {n} MiB of disk, has {l}"),
            Self::Cpus => f.write_str("has too few processors"),
            Self::NoImage(i) => write!(f, "does not hold image '{i}'"),
            Self::NoNetwork(why) => write!(f, "cannot have its network: it {why}"),
        }
    }
}

/// Nothing fits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementRefusal {
    /// The named site is not known.
    #[error("no site '{0}'")]
    UnknownSite(Name),
    /// There is no site at all, or the machine is at the only one.
    #[error("there is no other site")]
    NoSite,
    /// It is there already.
    #[error("it is at '{0}' already")]
    Already(Name),
    /// No site fits; each with its reason.
    #[error("no site fits: {}", .0.iter().map(|(n, u)| format!("{n} {u}")).collect::<Vec<_>>().join("; "))]
    NoneFits(Vec<(Name, Unfit)>),
}

impl CodedError for PlacementRefusal {
    fn code(&self) -> Code {
        match self {
            Self::UnknownSite(_) => Code::NotFound,
            Self::NoSite => Code::Unavailable,
            Self::Already(_) => Code::Conflict,
            Self::NoneFits(why) => {
                if why.iter().all(|(_, u)| matches!(u, Unfit::Unreachable)) {
                    Code::Unavailable
                } else if why
                    .iter()
                    .any(|(_, u)| matches!(u, Unfit::NoImage(_) | Unfit::NoNetwork(_)))
                {
                    Code::Conflict
                } else {
                    Code::NoRoom
                }
            }
        }
    }
}

impl PlacementRefusal {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownSite(_) => Some("see the sites with: godwit site list".into()),
            Self::NoSite => {
                Some("let a site join: godwit site token NAME, then godwit site join there".into())
            }
            Self::Already(_) => None,
            Self::NoneFits(why) => why.iter().find_map(|(n, u)| match u {
                Unfit::NoImage(i) => {
                    Some(format!("build it there: godwit image build {i} --site {n}"))
                }
                Unfit::NoNetwork(_) => Some(format!(
                    "see what is missing there with: godwit doctor; or update '{n}', or name another site"
                )),
                Unfit::Memory(..)
                | Unfit::Promised(..)
                | Unfit::RamFiles(..)
                | Unfit::Disk(..)
                | Unfit::Cpus => {
                    Some("stop or delete a machine there, or name another site".into())
                }
                Unfit::Unreachable => None,
            }),
        }
    }
}

/// Chooses a site for `demand` at `now`.
///
/// # Errors
/// [`PlacementRefusal`] that says for each site why not.
pub fn place(
    demand: &Demand,
    sites: &[SiteRecord],
    now: UnixMs,
) -> Result<Placement, PlacementRefusal> {
    if let Some(only) = &demand.only {
        if !sites.iter().any(|s| &s.name == only) {
            return Err(PlacementRefusal::UnknownSite(only.clone()));
        }
        if demand.not.as_ref() == Some(only) {
            return Err(PlacementRefusal::Already(only.clone()));
        }
    }
    // A device is somebody's own: what was not meant for it does not go there.
    let meant = |s: &SiteRecord| match &demand.only {
        Some(only) => *only == s.name,
        None => s.kind != SiteKind::Device,
    };
    let candidates = sites.iter().filter(|s| meant(s) && demand.not.as_ref() != Some(&s.name));
    let mut unfit = Vec::new();
    let mut best: Option<(&SiteRecord, bool)> = None;
    for site in candidates {
        match fits(demand, site, now) {
            Err(why) => unfit.push((site.name.clone(), why)),
            Ok(()) => {
                let holds = holds(demand, site);
                if best.is_none_or(|b| better((site, holds), b)) {
                    best = Some((site, holds));
                }
            }
        }
    }
    match best {
        Some((site, holds)) => Ok(Placement { site: site.name.clone(), holds }),
        None if unfit.is_empty() => Err(PlacementRefusal::NoSite),
        None => Err(PlacementRefusal::NoneFits(unfit)),
    }
}

fn fits(demand: &Demand, site: &SiteRecord, now: UnixMs) -> Result<(), Unfit> {
    if site.state(now) != SiteState::Ready {
        return Err(Unfit::Unreachable);
    }
    if let Some(why) = demand.barred.get(&site.name) {
        return Err(Unfit::NoNetwork(why.clone()));
    }
    let r = &site.report;
    let ram = u64::from(demand.memory.0);
    let need = ram + MACHINE_OVERHEAD_MIB + HOST_RESERVE_MIB;
    if r.memory_free_mib < need {
        return Err(Unfit::Memory(need, r.memory_free_mib));
    }
    let share = ram + MACHINE_OVERHEAD_MIB;
    let left = r.memory_promise_mib.saturating_sub(r.memory_promised_mib);
    if r.memory_promise_mib > 0 && left < share {
        return Err(Unfit::Promised(share, left));
    }
    if r.ram_files_free_mib < ram {
        return Err(Unfit::RamFiles(ram, r.ram_files_free_mib));
    }
    if r.disk_free_mib < DISK_RESERVE_MIB {
        return Err(Unfit::Disk(DISK_RESERVE_MIB, r.disk_free_mib));
    }
    if (u64::from(r.vms) + 1) * u64::from(demand.vcpus) > u64::from(r.cpus) * VCPUS_PER_CPU {
        return Err(Unfit::Cpus);
    }
    if let Source::Live(image) = &demand.source
        && !r.images.contains(image)
    {
        return Err(Unfit::NoImage(image.clone()));
    }
    Ok(())
}

fn holds(demand: &Demand, site: &SiteRecord) -> bool {
    match &demand.source {
        Source::Image(i) | Source::Live(i) => site.report.images.contains(i),
        Source::Substrate(s) => site.report.substrates.contains(s),
    }
}

/// Whether `a` is to be preferred to `b`.
fn better(a: (&SiteRecord, bool), b: (&SiteRecord, bool)) -> bool {
    let share = |s: &SiteRecord| s.report.memory_free_mib / (u64::from(s.report.vms) + 1);
    (a.1, share(a.0), std::cmp::Reverse(&a.0.name))
        > (b.1, share(b.0), std::cmp::Reverse(&b.0.name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_site::SiteReport;
    use proptest::prelude::*;

    fn name(s: &str) -> Name {
        Name::new(s).expect("name")
    }

    fn site(n: &str, free: u64) -> SiteRecord {
        SiteRecord {
            name: name(n),
            kind: SiteKind::Ap,
            joined: UnixMs(0),
            lease_until: UnixMs(1000),
            last_seen: UnixMs(0),
            revoked: false,
            report: SiteReport {
                cpus: 2,
                memory_mib: 24_000,
                memory_free_mib: free,
                ram_files_free_mib: 8_000,
                disk_free_mib: 50_000,
                images: [name("tiny")].into(),
                ..SiteReport::default()
            },
        }
    }

    fn demand() -> Demand {
        Demand {
            memory: Mib(256),
            vcpus: 1,
            source: Source::Image(name("tiny")),
            only: None,
            not: None,
            barred: BTreeMap::new(),
        }
    }

    fn choose(d: &Demand, s: &[SiteRecord]) -> String {
        place(d, s, UnixMs(1000)).expect("placed").site.to_string()
    }

    fn refuse(d: &Demand, s: &[SiteRecord]) -> PlacementRefusal {
        place(d, s, UnixMs(1000)).expect_err("refused")
    }

    #[test]
    fn more_room_wins_when_all_hold_it() {
        assert_eq!(choose(&demand(), &[site("a", 2000), site("b", 9000)]), "b");
    }

    #[test]
    fn a_device_runs_only_what_names_it() {
        let mut phone = site("phone", 90_000);
        phone.kind = SiteKind::Device;
        assert_eq!(choose(&demand(), &[site("a", 2000), phone.clone()]), "a");
        assert_eq!(refuse(&demand(), std::slice::from_ref(&phone)), PlacementRefusal::NoSite);
        let named = Demand { only: Some(name("phone")), ..demand() };
        assert_eq!(choose(&named, &[site("a", 2000), phone]), "phone");
    }

    #[test]
    fn who_holds_the_substrate_wins_over_more_room() {
        let id = SubstrateId::new();
        let mut a = site("a", 2000);
        a.report.substrates.insert(id);
        let d = Demand { source: Source::Substrate(id), ..demand() };
        let p = place(&d, &[a.clone(), site("b", 9000)], UnixMs(1)).expect("placed");
        assert_eq!(p, Placement { site: name("a"), holds: true });
        // But room comes first.
        a.report.memory_free_mib = 300;
        let p = place(&d, &[a, site("b", 9000)], UnixMs(1)).expect("placed");
        assert_eq!(p, Placement { site: name("b"), holds: false });
    }

    #[test]
    fn load_is_shared_out() {
        let mut a = site("a", 9000);
        a.report.vms = 5;
        assert_eq!(choose(&demand(), &[a, site("b", 6000)]), "b");
    }

    #[test]
    fn equals_go_by_name_so_that_the_choice_is_the_same_each_time() {
        assert_eq!(choose(&demand(), &[site("b", 5000), site("a", 5000)]), "a");
        assert_eq!(choose(&demand(), &[site("a", 5000), site("b", 5000)]), "a");
    }

    #[test]
    fn a_site_with_no_fresh_lease_or_revoked_is_left_out() {
        let mut a = site("a", 9000);
        a.lease_until = UnixMs(999);
        assert_eq!(choose(&demand(), &[a.clone(), site("b", 5000)]), "b");
        let r = refuse(&demand(), &[a.clone()]);
        assert_eq!(
            (r.to_string().as_str(), r.code()),
            ("no site fits: a does not answer", Code::Unavailable)
        );
        a.lease_until = UnixMs(2000);
        a.revoked = true;
        assert_eq!(refuse(&demand(), &[a]).code(), Code::Unavailable);
    }

    #[test]
    fn each_kind_of_room_is_asked_for() {
        let mut s = site("a", 575);
        assert_eq!(
            refuse(&demand(), &[s.clone()]).to_string(),
            "no site fits: a needs 576 MiB of memory, has 575"
        );
        s.report.memory_free_mib = 576;
        assert_eq!(choose(&demand(), &[s.clone()]), "a");
        s.report.ram_files_free_mib = 255;
        let r = refuse(&demand(), &[s.clone()]);
        assert!(matches!(&r, PlacementRefusal::NoneFits(w) if w[0].1 == Unfit::RamFiles(256, 255)));
        assert_eq!(r.code(), Code::NoRoom);
        assert!(r.hint().expect("advice").contains("stop or delete"));
        s.report.ram_files_free_mib = 256;
        s.report.disk_free_mib = 511;
        assert!(refuse(&demand(), &[s.clone()]).to_string().contains("512 MiB of disk, has 511"));
        s.report.disk_free_mib = 512;
        s.report.vms = 20;
        assert!(refuse(&demand(), &[s]).to_string().contains("too few processors"));
    }

    #[test]
    fn the_named_site_is_obeyed_or_refused_never_replaced() {
        let d = Demand { only: Some(name("a")), ..demand() };
        assert_eq!(choose(&d, &[site("a", 2000), site("b", 9000)]), "a");
        assert_eq!(refuse(&d, &[site("a", 100), site("b", 9000)]).code(), Code::NoRoom);
        let r = refuse(&d, &[site("b", 9000)]);
        assert_eq!((r.to_string().as_str(), r.code()), ("no site 'a'", Code::NotFound));
    }

    #[test]
    fn a_live_machine_goes_elsewhere_and_only_where_its_image_is() {
        let d = Demand { source: Source::Live(name("abiword")), not: Some(name("a")), ..demand() };
        let r = refuse(&d, &[site("a", 9000), site("b", 9000)]);
        assert_eq!(r.code(), Code::Conflict);
        assert_eq!(
            r.hint().expect("advice"),
            "build it there: godwit image build abiword --site b"
        );
        let mut b = site("b", 3000);
        b.report.images.insert(name("abiword"));
        assert_eq!(choose(&d, &[site("a", 9000), b]), "b");
        assert_eq!(refuse(&d, &[site("a", 9000)]), PlacementRefusal::NoSite);
        let d = Demand { only: Some(name("a")), ..d };
        assert_eq!(refuse(&d, &[site("a", 9000)]), PlacementRefusal::Already(name("a")));
    }

    #[test]
    fn a_site_that_cannot_have_its_network_is_chosen_only_for_machines_without() {
        let barred = BTreeMap::from([(name("a"), "lacks nftables".to_owned())]);
        let d = Demand { barred, ..demand() };
        assert_eq!(choose(&demand(), &[site("a", 9000), site("b", 2000)]), "a");
        assert_eq!(choose(&d, &[site("a", 9000), site("b", 2000)]), "b");
        let r = refuse(&d, &[site("a", 9000)]);
        assert_eq!(r.to_string(), "no site fits: a cannot have its network: it lacks nftables");
        assert_eq!(r.code(), Code::Conflict);
        assert!(r.hint().expect("advice").contains("godwit doctor"));
    }

    #[test]
    fn no_sites_at_all() {
        let r = refuse(&demand(), &[]);
        assert_eq!(r, PlacementRefusal::NoSite);
        assert!(r.hint().expect("advice").contains("site token"));
    }

    proptest! {
        #[test]
        fn a_choice_always_fits_and_the_order_of_sites_does_not_matter(
            free in proptest::collection::vec((0u64..4000, 0u64..1000, 0u32..30, any::<bool>()), 0..6),
            mem in 1u32..2000,
        ) {
            let id = SubstrateId::new();
            let sites: Vec<_> = free.iter().enumerate().map(|(i, &(m, t, v, h))| {
                let mut s = site(&format!("s{i}"), m);
                s.report.ram_files_free_mib = t;
                s.report.vms = v;
                if h { s.report.substrates.insert(id); }
                s
            }).collect();
            let d = Demand { memory: Mib(mem), source: Source::Substrate(id), ..demand() };
            let out = place(&d, &sites, UnixMs(1));
            let mut back = sites.clone();
            back.reverse();
            if let Ok(p) = &out {
                let s = sites.iter().find(|s| s.name == p.site).expect("one of them");
                prop_assert!(fits(&d, s, UnixMs(1)).is_ok());
                let fitting_holder = sites.iter().any(|s| holds(&d, s) && fits(&d, s, UnixMs(1)).is_ok());
                prop_assert_eq!(p.holds, fitting_holder);
                prop_assert_eq!(&out, &place(&d, &back, UnixMs(1)));
            } else {
                prop_assert!(place(&d, &back, UnixMs(1)).is_err());
            }
        }
    }
}
