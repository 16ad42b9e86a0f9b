//! Programs for benchmarks and tests only: a packet generator, a sink and a competing TC program. Not part
//! of the agent's object.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![allow(unreachable_pub, missing_docs, reason = "a program has no users; entry points are exported by aya's macros")]
#![expect(clippy::cast_ptr_alignment, reason = "live frames and map values start at a multiple of 4")]

#[cfg(target_arch = "bpf")]
#[path = "../runtime.rs"]
mod runtime;

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_SHOT, xdp_action},
    btf_maps::{Array, PerCpuArray},
    helpers::{bpf_ktime_get_ns, bpf_redirect},
    macros::{btf_map, classifier, xdp},
    programs::{TcContext, XdpContext},
};
use raven_common::{
    checksum,
    generator::{FRAME_LEN, Generator, Sender},
};

/// Settings of the generator. Written by user space before a run.
#[btf_map]
static GENERATOR: Array<Generator, 1> = Array::new();

/// State of the generator on this CPU.
#[btf_map]
static SENDER: PerCpuArray<Sender, 1> = PerCpuArray::new();

/// Number of frames that arrived. Written by one CPU only, the one that runs the hop.
#[btf_map]
static ARRIVED: Array<u64, 1> = Array::new();

/// Returns the current value of [`ARRIVED`].
#[inline(always)]
fn arrived() -> u64 {
    // SAFETY: the array's only entry always exists; a slightly stale count is sufficient.
    ARRIVED.get_ptr_mut(0).map_or(0, |count| unsafe { count.read_volatile() })
}

/// Limit of frames in flight. A veth's queue holds 256 frames, and 64 are created before the first one is released. The
/// sending CPU would free frames that do not fit into the queue, in contention with the hop, which frees arrived
/// frames; that cost is not part of a hop.
const WINDOW: u64 = 160;
/// Iterations, each with one read of the clock, until a full window is counted as lost: a fifth of a millisecond.
const PATIENCE: u32 = 8192;
/// Iterations between two reads of [`ARRIVED`], whose cache line belongs to the hop's CPU.
const BETWEEN: u32 = 256;

/// Waits until a frame may be sent and returns its number.
#[inline(always)]
fn next() -> Option<u64> {
    // SAFETY: this CPU's own entry, which always exists.
    let sender = unsafe { &mut *SENDER.get_ptr_mut(0)? };
    if sender.sent - sender.done >= WINDOW {
        for look in 0..PATIENCE {
            if look % BETWEEN == 0 {
                sender.done = sender.lost + arrived();
                // Some frames counted as lost have arrived late.
                if sender.done > sender.sent {
                    sender.lost = sender.lost.saturating_sub(sender.done - sender.sent);
                    sender.done = sender.sent;
                }
                if sender.sent - sender.done < WINDOW {
                    break;
                }
            }
            // SAFETY: a helper call without arguments.
            unsafe { bpf_ktime_get_ns() };
        }
        // The frames in flight are lost.
        if sender.sent - sender.done >= WINDOW {
            sender.lost += sender.sent - sender.done;
            sender.done = sender.sent;
        }
    }
    sender.sent += 1;
    Some(sender.sent)
}

/// Rewrites each frame passed by `BPF_PROG_TEST_RUN` (pages are reused as the last receiver left them) with the next
/// address of the cycle, and sends it from a device. Since Linux 5.18 (live frames).
#[xdp]
pub fn generate(ctx: XdpContext) -> u32 {
    let Some(generator) = GENERATOR.get(0) else { return xdp_action::XDP_ABORTED };
    let start = ctx.data();
    if start + FRAME_LEN > ctx.data_end() {
        return xdp_action::XDP_ABORTED;
    }
    let Some(number) = next() else { return xdp_action::XDP_ABORTED };
    // At least 1, so that no panic for a division by zero is generated.
    let turn = (number % u64::from(generator.addresses.max(1))) as u32;
    let address = u32::from_be_bytes(generator.base) + turn * generator.stride;
    let [high, low] = [(address >> 16) as u16, address as u16];
    let [base_high, base_low] = [
        u16::from_be_bytes([generator.base[0], generator.base[1]]),
        u16::from_be_bytes([generator.base[2], generator.base[3]]),
    ];
    let sum = checksum::update(checksum::update(generator.checksum as u16, base_high, high), base_low, low);
    let (at, sum_at) = (generator.address_at as usize & 0x7f, generator.checksum_at as usize & 0x7f);
    if start + at + 4 > ctx.data_end() || start + sum_at + 2 > ctx.data_end() {
        return xdp_action::XDP_ABORTED;
    }
    // SAFETY: FRAME_LEN was checked to fit into the frame, and both fields again at their own offsets. Live frames
    // start at a multiple of 4, as does the template in the map's value.
    unsafe {
        // Word by word: a single assignment would call memcpy, which is not available.
        let frame = generator.frame.as_ptr().cast::<u32>();
        for word in 0..FRAME_LEN / 4 {
            (start as *mut u32).add(word).write_volatile(frame.add(word).read_volatile());
        }
        *((start + at) as *mut [u8; 4]) = address.to_be_bytes();
        *((start + sum_at) as *mut [u8; 2]) = sum.to_be_bytes();
        bpf_redirect(generator.ifindex, 0) as u32
    }
}

/// Passes every frame. A veth accepts frames from XDP only if its peer has an XDP program.
#[xdp]
pub fn pass(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

/// Counts and drops every packet in TC, in place of WireGuard or the network card.
#[classifier]
pub fn swallow(_ctx: TcContext) -> i32 {
    if let Some(count) = ARRIVED.get_ptr_mut(0) {
        // SAFETY: the array's only entry always exists, and no other CPU writes it.
        unsafe { count.write_volatile(count.read_volatile() + 1) };
    }
    TC_ACT_SHOT
}

/// Ends the chain in TC with `TC_ACT_OK`, as Cilium's programs do: later programs do not see the packet.
#[classifier]
pub fn last_word(_ctx: TcContext) -> i32 {
    TC_ACT_OK
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
