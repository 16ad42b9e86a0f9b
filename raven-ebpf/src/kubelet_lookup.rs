//! sk_lookup of a cloud gateway node: a connection to a kubelet of another pool, by that node's address, ends in the proxy's listener.
//!
//! The node's routing brings such connections here, as if the address were its own (`raven-agent/src/link/detour.rs`): those that are
//! forwarded to it and those of its own processes and pods alike, which no TC hook sees all of. Runs once per connection, at its SYN.
//!
//! Without a listener (no agent runs) the SYN is dropped, and the client's next one, a second later, may find the new agent. It must not
//! end at the next best socket: the gateway node has a kubelet of its own on that port.

use aya_ebpf::{
    bindings::sk_action::{SK_DROP, SK_PASS},
    programs::SkLookupContext,
};

use crate::maps::{self, PROXY};

/// `AF_INET`.
const INET: u32 = 2;
const TCP: u32 = 6;

/// See the module's text.
#[inline(always)]
pub fn run(ctx: &SkLookupContext) -> u32 {
    // SAFETY: the kernel hands a valid context to the program; these are plain reads of it.
    let (family, protocol, address, port) =
        unsafe { ((*ctx.lookup).family, (*ctx.lookup).protocol, (*ctx.lookup).local_ip4, (*ctx.lookup).local_port) };
    if family != INET || protocol != TCP {
        return SK_PASS;
    }
    if !maps::is_kubelet(address.to_ne_bytes(), port as u16) {
        return SK_PASS;
    }
    match PROXY.redirect_sk_lookup(ctx, 0, 0) {
        Ok(()) => SK_PASS,
        Err(_) => SK_DROP,
    }
}
