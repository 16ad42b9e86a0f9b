//! The first MAC of WireGuard's handshake messages (whitepaper §5.4.4). Its sender knows the receiver's public key, or has
//! captured a message of one who does. Knowing the receiver's address is not enough.
//!
//! It is BLAKE2s (RFC 7693) with a key of 32 bytes and an output of 16. One implementation serves the programs and user
//! space: programs cannot use a crate that keeps its state in slices.

/// Label that is hashed with the public key into the MAC's key.
const LABEL: &[u8; 8] = b"mac1----";
/// Length of what the MAC of an initiation covers in bytes.
const COVERED: u64 = 116;
/// Length of a block of BLAKE2s in bytes.
const BLOCK: u64 = 64;

/// Initialisation vector (RFC 7693 §2.6).
const IV: [u32; 8] =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];

/// Value of `MAC1_KEY`, which has one entry: the state of the hash after the key's block. All zero: initiations are not
/// checked.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mac1Key {
    /// The eight words of the state.
    pub state: [u32; 8],
}

/// The first 132 bytes of a handshake initiation: what the MAC covers, and the MAC.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Initiation {
    first: [[u8; 4]; 16],
    second: [[u8; 4]; 16],
    last: [u8; 4],
}

/// Value of `MAC1_CHECK`, which has one entry per CPU: an initiation, and the hash while it is checked. Together they are too
/// large for a program's stack.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Mac1Check {
    /// The message.
    pub initiation: Initiation,
    state: [u32; 8],
    work: [u32; 16],
}

const _: () = assert!(size_of::<Mac1Key>() == 32 && align_of::<Initiation>() == 1);
const _: () = assert!(size_of::<Initiation>() == 132 && size_of::<Mac1Check>() == 132 + 32 + 64);

impl Mac1Key {
    /// The key of messages to the owner of a public key.
    #[must_use]
    pub fn of(public: &[u8; 32]) -> Self {
        let mut block = [[0; 4]; 16];
        for (word, bytes) in block.iter_mut().zip(LABEL.chunks_exact(4).chain(public.chunks_exact(4))) {
            word.copy_from_slice(bytes);
        }
        let mut work = [0; 16];
        let mut key = start(32, 0);
        hash(&mut key, &mut work, &block, (LABEL.len() + public.len()) as u64, true);
        let mut block = [[0; 4]; 16];
        for (word, state) in block.iter_mut().zip(key) {
            *word = state.to_le_bytes();
        }
        let mut state = start(16, 32);
        hash(&mut state, &mut work, &block, BLOCK, false);
        Self { state }
    }

    /// True if no key is set.
    #[inline(always)]
    #[must_use]
    pub fn is_unset(&self) -> bool {
        self.state[0] == 0 && self.state[1] == 0
    }

    /// True if the MAC of the message is valid. Changes the message.
    #[inline(always)]
    #[must_use]
    pub fn accepts(&self, check: &mut Mac1Check) -> bool {
        let Mac1Check { initiation: Initiation { first, second, last }, state, work } = check;
        let mac = [second[13], second[14], second[15], *last];
        [second[13], second[14], second[15]] = [[0; 4]; 3];
        *state = self.state;
        hash(state, work, first, 2 * BLOCK, false);
        hash(state, work, second, BLOCK + COVERED, true);
        let differs = |at: usize| state[at] ^ u32::from_le_bytes(mac[at]);
        differs(0) | differs(1) | differs(2) | differs(3) == 0
    }
}

/// The state before the first block (RFC 7693 §2.5). Lengths in bytes.
fn start(output: u32, key: u32) -> [u32; 8] {
    let mut state = IV;
    state[0] ^= 0x0101_0000 ^ key << 8 ^ output;
    state
}

/// The order in which each round takes the message's words, the first in the lowest four bits (RFC 7693 §2.7).
const ORDERS: [u64; 10] = [
    0xfedc_ba98_7654_3210,
    0x357b_20c1_6df9_84ae,
    0x4917_63ea_df25_0c8b,
    0x8f04_a562_ebcd_1397,
    0xd386_cb1e_fa42_7509,
    0x91ef_57d4_38b0_a6c2,
    0xb829_3670_a4de_f15c,
    0xa268_4f05_931c_e7bd,
    0x5a41_7d2c_803b_9ef6,
    0x0dc3_e9bf_5167_482a,
];

/// Adds a block to the state (RFC 7693 §3.2). `count`: bytes hashed so far, with this block.
#[inline(always)]
fn hash(state: &mut [u32; 8], work: &mut [u32; 16], block: &[[u8; 4]; 16], count: u64, last: bool) {
    let [a, b, c, d, e, f, g, h] = *state;
    *work = [a, b, c, d, e, f, g, h, IV[0], IV[1], IV[2], IV[3], IV[4], IV[5], IV[6], IV[7]];
    work[12] ^= count as u32;
    work[13] ^= (count >> 32) as u32;
    work[14] ^= if last { u32::MAX } else { 0 };
    for order in ORDERS {
        round(work, block, order);
    }
    for at in 0..8 {
        state[at] ^= work[at] ^ work[at + 8];
    }
}

/// The words of the state that each step of a round mixes, the first in the lowest four bits.
const STEPS: [u16; 8] = [0xc840, 0xd951, 0xea62, 0xfb73, 0xfa50, 0xcb61, 0xd872, 0xe943];

/// One round. Not inlined, nor is its step: unrolled, they would need more stack than a program has.
#[inline(never)]
fn round(work: &mut [u32; 16], block: &[[u8; 4]; 16], order: u64) {
    let mut order = order;
    for step in STEPS {
        let word = |at: u64| u32::from_le_bytes(block[(at & 15) as usize]);
        mix(work, step, word(order), word(order >> 4));
        order >>= 8;
    }
}

/// Mixes two words of the message into four of the state (function G, RFC 7693 §3.1).
#[inline(never)]
fn mix(v: &mut [u32; 16], step: u16, x: u32, y: u32) {
    let at = |n: u16| (step >> (4 * n) & 15) as usize;
    let (mut a, mut b, mut c, mut d) = (v[at(0)], v[at(1)], v[at(2)], v[at(3)]);
    a = a.wrapping_add(b).wrapping_add(x);
    d = (d ^ a).rotate_right(16);
    c = c.wrapping_add(d);
    b = (b ^ c).rotate_right(12);
    a = a.wrapping_add(b).wrapping_add(y);
    d = (d ^ a).rotate_right(8);
    c = c.wrapping_add(d);
    b = (b ^ c).rotate_right(7);
    (v[at(0)], v[at(1)], v[at(2)], v[at(3)]) = (a, b, c, d);
}
