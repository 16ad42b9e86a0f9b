//! Programs of benchmarks and tests, and of nothing else: a packet generator, a sink, a neighbour. Not in the agent's object.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

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

/// What to send. Written before a run, read by the generator.
#[btf_map]
static GENERATOR: Array<Generator, 1> = Array::new();

/// What this CPU has sent.
#[btf_map]
static SENDER: PerCpuArray<Sender, 1> = PerCpuArray::new();

/// How many frames arrived. One CPU counts: the hop's.
#[btf_map]
static ARRIVED: Array<u64, 1> = Array::new();

/// How many frames arrived, as the hop's CPU counts them now.
#[inline(always)]
fn arrived() -> u64 {
    // SAFETY: the array's only entry always exists; a count that is a moment old is as good.
    ARRIVED.get_ptr_mut(0).map_or(0, |count| unsafe { count.read_volatile() })
}

/// Frames on their way at a time: a veth's queue holds 256, and 64 are made before any is let go. What does not fit into the queue would be
/// given back to the generator's memory by its CPU, and contend there with the hop, which gives back what arrived: that is no part of a hop.
const WINDOW: u64 = 160;
/// Looks at the clock, which pass the time, until a full window is given up: a fifth of a millisecond.
const PATIENCE: u32 = 8192;
/// And in between two looks at what arrived, whose cache line is the hop's.
const BETWEEN: u32 = 256;

/// Waits until a frame may be sent; gives its number.
#[inline(always)]
fn next() -> Option<u64> {
    // SAFETY: this CPU's own entry, which always exists.
    let sender = unsafe { &mut *SENDER.get_ptr_mut(0)? };
    if sender.sent - sender.done >= WINDOW {
        for look in 0..PATIENCE {
            if look % BETWEEN == 0 {
                sender.done = sender.lost + arrived();
                // Some that were given up have arrived after all.
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
        // What is lost on the way never arrives.
        if sender.sent - sender.done >= WINDOW {
            sender.lost += sender.sent - sender.done;
            sender.done = sender.sent;
        }
    }
    sender.sent += 1;
    Some(sender.sent)
}

/// Makes each frame that `BPF_PROG_TEST_RUN` hands in anew (the pages come back as the last receiver left them), with the
/// next of the addresses in turn, and sends it out of a device. Since Linux 5.18 (live frames).
#[xdp]
pub fn generate(ctx: XdpContext) -> u32 {
    let Some(generator) = GENERATOR.get(0) else { return xdp_action::XDP_ABORTED };
    let start = ctx.data();
    if start + FRAME_LEN > ctx.data_end() {
        return xdp_action::XDP_ABORTED;
    }
    let Some(number) = next() else { return xdp_action::XDP_ABORTED };
    // Never zero, or there would be a panic to call.
    let turn = (number % u64::from(generator.addresses.max(1))) as u32;
    let address = u32::from_be_bytes(generator.base) + turn * generator.stride;
    let [high, low] = [(address >> 16) as u16, address as u16];
    let [base_high, base_low] =
        [u16::from_be_bytes([generator.base[0], generator.base[1]]), u16::from_be_bytes([generator.base[2], generator.base[3]])];
    let sum = checksum::update(checksum::update(generator.checksum as u16, base_high, high), base_low, low);
    let (at, sum_at) = (generator.address_at as usize & 0x7f, generator.checksum_at as usize & 0x7f);
    if start + at + 4 > ctx.data_end() || start + sum_at + 2 > ctx.data_end() {
        return xdp_action::XDP_ABORTED;
    }
    // SAFETY: all of FRAME_LEN was checked to lie in the frame, and both fields again at their own offsets. Live frames
    // start at a multiple of 4, and so does the template in the map's value.
    unsafe {
        // Word by word: as one assignment it would be a call to memcpy, which is not there.
        let frame = generator.frame.as_ptr().cast::<u32>();
        for word in 0..FRAME_LEN / 4 {
            (start as *mut u32).add(word).write_volatile(frame.add(word).read_volatile());
        }
        *((start + at) as *mut [u8; 4]) = address.to_be_bytes();
        *((start + sum_at) as *mut [u8; 2]) = sum.to_be_bytes();
        bpf_redirect(generator.ifindex, 0) as u32
    }
}

/// Lets a frame pass: what a veth wants its peer to have before it takes frames from XDP.
#[xdp]
pub fn pass(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

/// Counts and drops, in TC: where WireGuard or the network card would take the packet; or to measure what comes before.
#[classifier]
pub fn swallow(_ctx: TcContext) -> i32 {
    if let Some(count) = ARRIVED.get_ptr_mut(0) {
        // SAFETY: the array's only entry always exists, and no other CPU writes it.
        unsafe { count.write_volatile(count.read_volatile() + 1) };
    }
    TC_ACT_SHOT
}

/// Lets every packet pass and lets nobody behind it see one, in TC: as Cilium's programs do.
#[classifier]
pub fn last_word(_ctx: TcContext) -> i32 {
    TC_ACT_OK
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
