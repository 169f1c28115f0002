//! Where siblings may run: `SCHED_DISPATCH` (Algorithm 2, lines 1 to 10 of the thesis) from user
//! space. Pure.
//!
//! The thesis lets a vCPU run on every pCPU that holds no sibling, and asks the kernel at each
//! migration. From outside nobody is asked, so here the pCPUs that a machine may use are dealt to
//! its vCPUs: each gets a set of its own that no sibling has. Within its set the kernel balances as
//! it likes, so no pCPU idles for the sake of a mask, and no two siblings ever share a queue.
//!
//! - The masks that vCPUs came with are respected: no vCPU gets a pCPU outside its own.
//! - As many vCPUs as can be get a pCPU without a sibling (a maximum matching), on the least loaded
//!   ones first.
//! - Where there are more vCPUs than pCPUs the others go, each for itself, where the fewest siblings
//!   are ("the rest of vCPUs", section 4.5, evenly instead of by chance).
//! - pCPUs that are left are dealt to whoever has the least room for what it wants to run.

use std::collections::BTreeMap;

use crate::cpus::CpuSet;

/// A vCPU to be placed.
#[derive(Debug, Clone, PartialEq)]
pub struct Wish {
    /// Which one.
    pub vcpu: u32,
    /// Where it may run.
    pub allowed: CpuSet,
    /// Where it is now.
    pub cpu: usize,
    /// How much of a pCPU it wants, 0 to 1.
    pub demand: f64,
}

/// Deals pCPUs to the vCPUs of one machine. `load` is what others want of each pCPU; pCPUs that it
/// does not name are offline. vCPUs that may run nowhere are left out of the answer.
#[must_use]
pub fn place(wishes: &[Wish], load: &BTreeMap<usize, f64>) -> BTreeMap<u32, CpuSet> {
    let table = Table::new(wishes, load);
    let homes = table.homes();
    let mut dealt: BTreeMap<u32, CpuSet> = BTreeMap::new();
    let mut taken: BTreeMap<usize, usize> = BTreeMap::new();
    for (wish, home) in wishes.iter().zip(&homes) {
        if let Some(cpu) = home {
            dealt.insert(wish.vcpu, CpuSet::single(*cpu));
            *taken.entry(*cpu).or_default() += 1;
        }
    }
    // Those for whom no pCPU was left.
    for i in table.hungriest() {
        if homes[i].is_some() {
            continue;
        }
        let seat = table.options[i].iter().copied().min_by(|a, b| {
            let siblings = |c: &usize| taken.get(c).copied().unwrap_or_default();
            siblings(a).cmp(&siblings(b)).then(load[a].total_cmp(&load[b])).then(a.cmp(b))
        });
        if let Some(cpu) = seat {
            dealt.insert(wishes[i].vcpu, CpuSet::single(cpu));
            *taken.entry(cpu).or_default() += 1;
        }
    }
    // pCPUs that nobody has, the least loaded first. None of them goes to a vCPU that shares its own
    // with a sibling: one of the two could have had it, and a maximum matching would have seen that.
    let mut free: Vec<usize> = load.keys().copied().filter(|c| !taken.contains_key(c)).collect();
    free.sort_by(|a, b| load[a].total_cmp(&load[b]).then(a.cmp(b)));
    for cpu in free {
        let room = |w: &Wish, set: &CpuSet| {
            let room: f64 = set.iter().map(|c| (1.0 - load[&c]).max(0.05)).sum();
            room - w.demand
        };
        let poorest = wishes
            .iter()
            .filter(|w| w.allowed.contains(cpu))
            .filter_map(|w| Some((w, room(w, dealt.get(&w.vcpu)?))))
            .min_by(|(a, x), (b, y)| x.total_cmp(y).then(a.vcpu.cmp(&b.vcpu)));
        if let Some((wish, _)) = poorest {
            dealt.entry(wish.vcpu).or_default().insert(cpu);
        }
    }
    dealt
}

/// By how much the fullest pCPU of these vCPUs is fuller than the emptiest pCPU that one of them
/// might have instead: what placing them anew could gain.
#[must_use]
pub fn imbalance(
    wishes: &[Wish],
    placed: &BTreeMap<u32, CpuSet>,
    load: &BTreeMap<usize, f64>,
) -> f64 {
    let burden = |w: &Wish| -> Option<f64> {
        let set = placed.get(&w.vcpu)?;
        let of: Vec<f64> = set.iter().filter_map(|c| load.get(&c).copied()).collect();
        Some((of.iter().sum::<f64>() + w.demand) / of.len().max(1) as f64)
    };
    let burdens: Vec<f64> = wishes.iter().filter_map(burden).collect();
    let most = burdens.iter().copied().fold(0.0, f64::max);
    let least = burdens.iter().copied().fold(f64::INFINITY, f64::min);
    if least.is_finite() { most - least } else { 0.0 }
}

struct Table<'a> {
    wishes: &'a [Wish],
    /// Where each may run, what suits it best first.
    options: Vec<Vec<usize>>,
}

impl<'a> Table<'a> {
    fn new(wishes: &'a [Wish], load: &BTreeMap<usize, f64>) -> Self {
        let options = wishes
            .iter()
            .map(|w| {
                let mut cpus: Vec<usize> =
                    load.keys().copied().filter(|c| w.allowed.contains(*c)).collect();
                // The least loaded; it stays where it is when that is as good.
                let rank = |c: &usize| load[c] - if *c == w.cpu { 0.1 } else { 0.0 };
                cpus.sort_by(|a, b| rank(a).total_cmp(&rank(b)).then(a.cmp(b)));
                cpus
            })
            .collect();
        Self { wishes, options }
    }

    /// vCPUs that want most first; of equals those that have fewest options.
    fn hungriest(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.wishes.len()).collect();
        order.sort_by(|a, b| {
            let (x, y) = (&self.wishes[*a], &self.wishes[*b]);
            y.demand
                .total_cmp(&x.demand)
                .then(self.options[*a].len().cmp(&self.options[*b].len()))
                .then(x.vcpu.cmp(&y.vcpu))
        });
        order
    }

    /// One pCPU for each, no two the same, for as many as can be: augmenting paths.
    fn homes(&self) -> Vec<Option<usize>> {
        let mut owner: BTreeMap<usize, usize> = BTreeMap::new();
        for i in self.hungriest() {
            self.seat(i, &mut owner);
        }
        let mut homes = vec![None; self.wishes.len()];
        for (cpu, i) in owner {
            homes[i] = Some(cpu);
        }
        homes
    }

    /// Seats vCPU `i`, moving others on where that helps. Iterative, since a chain may be as long
    /// as a machine has vCPUs.
    fn seat(&self, i: usize, owner: &mut BTreeMap<usize, usize>) {
        // Breadth first: `by[cpu]` is the vCPU through which a pCPU was reached.
        let mut by: BTreeMap<usize, usize> = BTreeMap::new();
        let mut from: BTreeMap<usize, usize> = BTreeMap::new();
        let mut next = std::collections::VecDeque::from([i]);
        while let Some(vcpu) = next.pop_front() {
            for cpu in &self.options[vcpu] {
                if by.contains_key(cpu) {
                    continue;
                }
                by.insert(*cpu, vcpu);
                let Some(sitting) = owner.get(cpu).copied() else {
                    let mut cpu = *cpu;
                    loop {
                        let vcpu = by[&cpu];
                        owner.insert(cpu, vcpu);
                        match from.get(&vcpu) {
                            Some(freed) if vcpu != i => cpu = *freed,
                            _ => return,
                        }
                    }
                };
                from.insert(sitting, *cpu);
                next.push_back(sitting);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn wish(vcpu: u32, allowed: &str, cpu: usize, demand: f64) -> Wish {
        Wish { vcpu, allowed: allowed.parse().expect("pCPUs"), cpu, demand }
    }

    fn load(of: &[f64]) -> BTreeMap<usize, f64> {
        of.iter().copied().enumerate().collect()
    }

    fn shown(placed: &BTreeMap<u32, CpuSet>) -> String {
        placed.iter().map(|(v, c)| format!("{v}:{c} ")).collect()
    }

    #[test]
    fn stacked_siblings_are_put_apart() {
        let wishes = [wish(0, "0-1", 0, 1.0), wish(1, "0-1", 0, 1.0)];
        let placed = place(&wishes, &load(&[0.0, 0.0]));
        assert_eq!(shown(&placed), "0:0 1:1 ");
    }

    #[test]
    fn a_well_placed_vcpu_stays() {
        let wishes = [wish(0, "0-1", 1, 1.0), wish(1, "0-1", 0, 1.0)];
        assert_eq!(shown(&place(&wishes, &load(&[0.0, 0.0]))), "0:1 1:0 ");
    }

    #[test]
    fn the_least_loaded_come_first_and_all_are_dealt() {
        let wishes = [wish(0, "0-3", 0, 1.0), wish(1, "0-3", 0, 0.2)];
        let placed = place(&wishes, &load(&[2.0, 1.5, 0.0, 1.0]));
        // The hungry one gets the emptiest and what is left over.
        assert!(placed[&0].contains(2), "{}", shown(&placed));
        assert_eq!(placed[&0].len() + placed[&1].len(), 4);
    }

    #[test]
    fn the_users_own_masks_are_respected_even_where_that_stacks() {
        let wishes = [wish(0, "0", 0, 1.0), wish(1, "0", 0, 1.0), wish(2, "0-1", 0, 1.0)];
        let placed = place(&wishes, &load(&[0.0, 0.0]));
        assert_eq!(shown(&placed), "0:0 1:0 2:1 ");
        // Who could go anywhere makes room for who can't.
        let wishes = [wish(0, "0-2", 1, 1.0), wish(1, "1", 1, 0.5), wish(2, "0-1", 0, 0.4)];
        assert_eq!(shown(&place(&wishes, &load(&[0.0, 0.0, 9.0]))), "0:2 1:1 2:0 ");
    }

    #[test]
    fn an_offline_pcpu_is_nobodys() {
        let wishes = [wish(0, "0-1", 1, 1.0), wish(1, "1", 1, 1.0)];
        let online: BTreeMap<usize, f64> = [(0, 0.0)].into();
        assert_eq!(shown(&place(&wishes, &online)), "0:0 ");
    }

    #[test]
    fn a_better_deal_is_noticed() {
        let wishes = [wish(0, "0-3", 0, 1.0), wish(1, "0-3", 1, 1.0)];
        let placed: BTreeMap<u32, CpuSet> =
            [(0, "0,2".parse().expect("set")), (1, "1,3".parse().expect("set"))].into();
        assert!(imbalance(&wishes, &placed, &load(&[1.0, 1.0, 1.0, 1.0])) < 0.01);
        assert!(imbalance(&wishes, &placed, &load(&[3.0, 0.0, 3.0, 0.0])) > 1.0);
    }

    proptest! {
        #[test]
        fn siblings_are_apart_whenever_they_can_be(
            masks in proptest::collection::vec(proptest::collection::btree_set(0usize..6, 1..6), 1..9),
            loads in proptest::collection::vec(0.0f64..4.0, 1..6),
        ) {
            let wishes: Vec<Wish> = masks.iter().zip(0u32..).map(|(m, vcpu)| Wish {
                vcpu, allowed: m.iter().copied().collect(), cpu: 0, demand: 1.0,
            }).collect();
            let load = load(&loads);
            let placed = place(&wishes, &load);
            for wish in &wishes {
                let possible = load.keys().any(|c| wish.allowed.contains(*c));
                prop_assert_eq!(placed.contains_key(&wish.vcpu), possible);
                if let Some(set) = placed.get(&wish.vcpu) {
                    prop_assert!(!set.is_empty() && set.is_subset(&wish.allowed));
                    prop_assert!(set.iter().all(|c| load.contains_key(&c)));
                }
            }
            // As many pCPUs are in use as a brute force finds.
            let used: CpuSet = placed.values().flat_map(|s| s.iter().collect::<Vec<_>>()).collect();
            prop_assert!(used.len() >= best(&wishes, &load, 0, &mut CpuSet::new()));
            // With the same freedom for all, siblings sit evenly.
            let all: CpuSet = load.keys().copied().collect();
            let free: Vec<Wish> =
                wishes.iter().map(|w| Wish { allowed: all.clone(), ..w.clone() }).collect();
            let placed = place(&free, &load);
            let on = |c: usize| placed.values().filter(|s| s.contains(c)).count();
            let counts: Vec<usize> = load.keys().map(|c| on(*c)).collect();
            let most = counts.iter().max().copied().unwrap_or_default();
            prop_assert!(most <= free.len().div_ceil(load.len()));
        }
    }

    /// The most vCPUs from `i` on that can have a pCPU each.
    fn best(w: &[Wish], load: &BTreeMap<usize, f64>, i: usize, used: &mut CpuSet) -> usize {
        let Some(wish) = w.get(i) else { return 0 };
        let mut most = best(w, load, i + 1, used);
        for cpu in load.keys().filter(|c| wish.allowed.contains(**c)) {
            if !used.contains(*cpu) {
                let mut with = used.clone();
                with.insert(*cpu);
                most = most.max(1 + best(w, load, i + 1, &mut with));
            }
        }
        most
    }
}
