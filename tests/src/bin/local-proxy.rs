//! A companion as Neon's local_proxy is one: its PID file is claimed, and on TERM it accepts nobody and waits for every client
//! that it has, without bound.
//!
//! `local_proxy PIDFILE ADDRESS`

use std::error::Error;

use shutdown_core::companions::PidFile;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::task::TaskTracker;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut next = || arguments.next().ok_or("local_proxy PIDFILE ADDRESS");
    let (pid_file, address) = (next()?, next()?);
    let mut term = signal(SignalKind::terminate())?;
    // Its descriptor is the lock: held to the end of this function.
    let _claimed = PidFile::claim(pid_file)?;
    let listener = TcpListener::bind(address).await?;
    println!("local_proxy on {}", listener.local_addr()?);
    let clients = TaskTracker::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (mut client, _) = accepted?;
                println!("local_proxy has a client");
                clients.spawn(async move { while client.read_u8().await.is_ok() {} });
            }
            _ = term.recv() => break,
        }
    }
    drop(listener);
    println!("local_proxy waits for {} clients", clients.len());
    clients.close();
    clients.wait().await;
    println!("local_proxy has ended");
    Ok(())
}
