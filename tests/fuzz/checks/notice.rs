//! What must hold for every datagram that a node gets. The fuzzer and the test that replays its corpus share it.

use std::net::SocketAddr;
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use shutdown_core::peers::notice::{
    ACK_BYTES, Datagram, Identity, Inbox, Keys, MOST_BYTES, NOTICE_BYTES, Refusal,
};
use shutdown_core::peers::{Incarnation, PeerRegistry};

/// The key of the examples in `docs/formats.md`, and when those were sent.
pub(crate) const KEY: [u8; 32] = {
    let mut key = [0; 32];
    let mut byte = 0;
    while byte < 32 {
        key[byte] = byte as u8;
        byte += 1;
    }
    key
};
const NOW: u64 = 1_795_273_890_000;

/// The key, with id 1.
pub(crate) fn keys() -> Keys {
    let hex: String = KEY.iter().map(|byte| format!("{byte:02x}")).collect();
    Keys::parse(&format!("1:{hex}")).expect("a key")
}

/// Reads the input; and once more as somebody would send it who has the key: else no fuzzer gets behind the MAC.
///
/// # Panics
///
/// If a law is broken.
pub(crate) fn check(input: &[u8]) -> Result<(), Refusal> {
    let read = receive(input);
    if let Some(sealed) = seal(input) {
        let cause = receive(&sealed).err();
        assert!(!matches!(cause, Some(Refusal::Mac | Refusal::TotalLength)), "{cause:?}");
    }
    read
}

/// What was read is written as it was, and what a node refuses has not changed it.
fn receive(datagram: &[u8]) -> Result<(), Refusal> {
    let keys = keys();
    let read = Datagram::decode(datagram, &keys);
    match &read {
        Ok(Datagram::Notice(notice)) => {
            let written = notice.encode(&keys);
            assert!(written.len() >= NOTICE_BYTES && written.len() <= MOST_BYTES);
            assert_eq!(Datagram::decode(&written, &keys), read, "a second reading differs");
        }
        Ok(Datagram::Ack(ack)) => assert_eq!(ack.encode(&keys), datagram, "an acknowledgement has one form"),
        Err(cause) => assert!(!cause.as_str().is_empty()),
    }
    let identity = Identity::new("us", "default", Incarnation::new(1), Vec::new());
    let peers = PeerRegistry::new(identity.node());
    let from = SocketAddr::from(([10, 0, 0, 1], 8443));
    peers.configure(from);
    let before = (peers.peers(NOW), *peers.subscribe().borrow());
    let heard =
        Inbox::new(identity.clone(), keys.clone(), peers.clone()).receive(datagram, from, Duration::MAX, NOW);
    match heard {
        Ok(heard) => {
            let answer = heard.answer.map_or(0, |answer| answer.len());
            assert!(answer == 0 || (answer == ACK_BYTES && answer <= datagram.len()));
            assert_eq!(identity.counts().received, 1);
        }
        Err(cause) => {
            assert_eq!(
                (peers.peers(NOW), *peers.subscribe().borrow()),
                before,
                "{cause} has changed something"
            );
            assert_eq!((identity.counts().received, identity.counts().refused), (0, 1));
        }
    }
    read.map(drop)
}

/// The input with its length and a MAC that fit, under the key that is known; `None` if it is no datagram at all.
pub(crate) fn seal(input: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(input.len()).ok().filter(|length| usize::from(*length) >= ACK_BYTES)?;
    let mut sealed = input.to_vec();
    sealed[7] = 1;
    sealed[8..10].copy_from_slice(&length.to_be_bytes());
    let content = sealed.len() - 32;
    let mut mac = Hmac::<Sha256>::new_from_slice(&KEY).expect("HMAC takes a key of any length");
    mac.update(b"sdpn-v1");
    mac.update(&sealed[..content]);
    sealed[content..].copy_from_slice(&mac.finalize().into_bytes());
    Some(sealed)
}
