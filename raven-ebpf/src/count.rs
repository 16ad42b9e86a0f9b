//! Counters of packets and bytes per remote Gateway and verdict.

use raven_common::{
    Verdict,
    tables::{Count, CounterKey, GatewayId, NO_GATEWAY},
};

use crate::maps::COUNTERS;

/// Decision of a program about one packet: the verdict, and the Gateway it is counted under.
#[derive(Clone, Copy)]
pub struct Decision {
    pub verdict: Verdict,
    pub gateway: GatewayId,
}

impl Decision {
    #[inline(always)]
    pub fn new(verdict: Verdict, gateway: GatewayId) -> Self {
        Self { verdict, gateway }
    }
}

/// A decision made before the Gateway is known.
impl From<Verdict> for Decision {
    #[inline(always)]
    fn from(verdict: Verdict) -> Self {
        Self { verdict, gateway: NO_GATEWAY }
    }
}

/// Adds to the counter of this CPU.
///
/// A non-atomic addition is sufficient: if one program preempts another on the same CPU, at most one count is lost, and
/// Linux 5.10 has no atomic instructions that return the old value.
#[inline(always)]
pub fn add(decision: Decision, packets: u64, bytes: u64) {
    let key = CounterKey { gateway: decision.gateway, verdict: decision.verdict as u32 };
    match COUNTERS.get_ptr_mut(&key) {
        Some(count) => {
            // SAFETY: the map returned a pointer to this CPU's value, which is valid until the program ends; entries
            // are never deleted while programs run.
            unsafe {
                (*count).packets += packets;
                (*count).bytes += bytes;
            }
        }
        // A program on another CPU may have inserted the key concurrently; values are per CPU, so
        // either order is correct.
        None => {
            let _ = COUNTERS.insert(&key, Count { packets, bytes }, 0);
        }
    }
}
