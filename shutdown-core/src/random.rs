//! Numbers that look random and can be repeated: no source of chance, so a test sees what it saw before.

/// A number in 0..1 that looks random (the finalizer of splitmix64).
pub(crate) fn fraction(of: u64) -> f64 {
    let mut bits = of.wrapping_add(0x9E37_79B9_7F4A_7C15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (bits ^ (bits >> 31)) as f64 / u64::MAX as f64
}
