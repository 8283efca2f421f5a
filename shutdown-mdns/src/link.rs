//! One interface over one family: a socket of our own that hears the group there and sends to it.
//!
//! It is bound to the group's address, so it takes no unicast datagram that mdns-sd or avahi waits for; Linux then sends
//! from the interface's own address, and from port 5353 as a response must (RFC 6762 §6).

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

use socket2::{Domain, InterfaceIndexOrAddress, Protocol, Socket, Type};
use tokio::net::UdpSocket;

use crate::interface::Interface;

/// The port of Multicast DNS.
pub(crate) const PORT: u16 = 5353;
const GROUP_V4: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 251);
const GROUP_V6: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0xfb);
/// Room for some hundred messages, for the time in which we are not scheduled.
const RECEIVE_BUFFER: usize = 1 << 20;

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "their names say it")]
pub enum Family {
    V4,
    V6,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// Opens the socket of an interface and family.
///
/// # Errors
///
/// What the system says.
pub(crate) fn open(interface: &Interface, family: Family) -> io::Result<UdpSocket> {
    let domain = match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    // mdns-sd and avahi hold the port as well.
    socket.set_reuse_address(true)?;
    #[cfg(unix)]
    socket.set_reuse_port(true)?;
    // A wish, too, but where it is granted nothing can leave by another interface, whatever the routes say.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    let _ = socket.bind_device(Some(interface.name.as_bytes()));
    // A wish; the default holds 256 small datagrams.
    let _ = socket.set_recv_buffer_size(RECEIVE_BUFFER);
    match family {
        Family::V4 => {
            // By default a socket hears every group that anybody on the host has joined, on any interface.
            #[cfg(any(target_os = "linux", target_os = "android"))]
            socket.set_multicast_all_v4(false)?;
            let address = interface.v4().ok_or(io::ErrorKind::AddrNotAvailable)?;
            socket.bind(&SocketAddr::from((GROUP_V4, PORT)).into())?;
            socket.join_multicast_v4_n(&GROUP_V4, &InterfaceIndexOrAddress::Index(interface.index))?;
            socket.set_multicast_if_v4(&address)?;
            socket.set_multicast_ttl_v4(255)?;
            socket.set_multicast_loop_v4(true)?;
        }
        Family::V6 => {
            socket.set_only_v6(true)?;
            #[cfg(any(target_os = "linux", target_os = "android"))]
            socket.set_multicast_all_v6(false)?;
            // With a scope the kernel binds it to the interface as well.
            socket.bind(&SocketAddrV6::new(GROUP_V6, PORT, 0, interface.index).into())?;
            socket.join_multicast_v6(&GROUP_V6, interface.index)?;
            socket.set_multicast_if_v6(interface.index)?;
            socket.set_multicast_hops_v6(255)?;
            socket.set_multicast_loop_v6(true)?;
        }
    }
    UdpSocket::from_std(socket.into())
}

/// Where a message of this family on this interface goes.
pub(crate) fn group(family: Family, index: u32) -> SocketAddr {
    match family {
        Family::V4 => SocketAddrV4::new(GROUP_V4, PORT).into(),
        Family::V6 => SocketAddrV6::new(GROUP_V6, PORT, 0, index).into(),
    }
}
