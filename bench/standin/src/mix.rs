//! Deterministic numbers and work.

use std::hint::black_box;

/// The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection that mixes well.
#[must_use]
pub const fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Computes for `turns` turns of [`mix`], each on the last one's result, so that no two overlap:
/// about 3 ns a turn on a processor of 3 GHz. The result belongs to `x` and `turns` alone.
#[must_use]
pub fn compute(x: u64, turns: u32) -> u64 {
    (0..turns).fold(black_box(x), |x, _| mix(x))
}

/// Turns of [`compute`] that take about a microsecond on a processor of 3 GHz: a turn is eight
/// dependent operations, two of them multiplications, some 13 cycles.
pub const TURNS_PER_US: f64 = 3000.0 / 13.0;

/// Turns for so many microseconds of that processor, at least one, on a processor that is `slower`
/// times slower ([`crate::Config::slower`]).
#[must_use]
pub fn turns(us: f64, slower: u32) -> u32 {
    (us * TURNS_PER_US / f64::from(slower)).round().max(1.0) as u32
}
