//! Rendezvous hashing: every node computes the same choice from the topology alone, and a candidate that leaves moves
//! only its own share.

/// The weight of a candidate for a key; the candidate with the largest weight is chosen.
///
/// FNV-1a over the parts, each ended by `/`, which no Kubernetes name contains; the finalizer of SplitMix64
/// spreads the result.
pub(super) fn weight(parts: &[&str]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in parts.iter().flat_map(|p| p.bytes().chain([b'/'])) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}
