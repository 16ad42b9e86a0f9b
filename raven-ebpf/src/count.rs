//! Counters: what happened, to packets of which gateway.

use raven_common::{
    Verdict,
    tables::{Count, CounterKey, GatewayId, NO_GATEWAY},
};

use crate::maps::COUNTERS;

/// What a program decided about one packet.
#[derive(Clone, Copy)]
pub struct Seen {
    pub verdict: Verdict,
    pub gateway: GatewayId,
}

impl Seen {
    #[inline(always)]
    pub fn new(verdict: Verdict, gateway: GatewayId) -> Self {
        Self { verdict, gateway }
    }
}

/// A packet whose gateway is not known (yet).
impl From<Verdict> for Seen {
    #[inline(always)]
    fn from(verdict: Verdict) -> Self {
        Self { verdict, gateway: NO_GATEWAY }
    }
}

/// Adds to the counter of this CPU. A plain addition: programs on one CPU do not preempt each other in the middle of
/// it in a way that loses more than one count, and 5.10 has no fetching atomics.
#[inline(always)]
pub fn add(seen: Seen, packets: u64, bytes: u64) {
    let key = CounterKey { gateway: seen.gateway, verdict: seen.verdict as u32 };
    match COUNTERS.get_ptr_mut(&key) {
        Some(count) => {
            // SAFETY: the map handed out a pointer to this CPU's value, valid until the program ends; entries are
            // never deleted while programs run.
            unsafe {
                (*count).packets += packets;
                (*count).bytes += bytes;
            }
        }
        // Another program may have inserted it in between on another CPU: the value is per CPU, so either order is right.
        None => {
            let _ = COUNTERS.insert(&key, Count { packets, bytes }, 0);
        }
    }
}
