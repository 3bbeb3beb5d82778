//! Process 1 of a container that asked for one: it starts the program as its child, passes signals on, and reaps orphans,
//! which a program that does not know that it is process 1 leaves lying and whose signals it would not get.

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};

use super::init::exit;
use super::spec::{Result, Step};

/// Returns in the child alone. The parent ends as the child does; a signal is told as the shell tells it, by 128 and its
/// number, because process 1 cannot be killed by its own.
#[expect(unsafe_code, reason = "fork has no safe form")]
pub fn fork() -> Result<()> {
    // Its executable is the machine's own forge: `/proc/1/exe` is not for the program to open (CVE-2019-5736).
    nix::sys::prctl::set_dumpable(false).step("hide forge from the program")?;
    let all = SigSet::all();
    all.thread_block().step("block signals")?;
    // SAFETY: this process has one thread.
    match unsafe { nix::unistd::fork() }.step("fork the program")? {
        ForkResult::Child => all.thread_unblock().step("unblock signals"),
        ForkResult::Parent { child } => {
            // SAFETY: this side goes on with its streams alone and never returns, so no owner of a descriptor is left.
            let closed = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
            exit(if closed == 0 { watch(child, &all) } else { 126 })
        }
    }
}

fn watch(program: Pid, signals: &SigSet) -> i32 {
    loop {
        match signals.wait() {
            Ok(Signal::SIGCHLD) => {
                if let Some(code) = reap(program) {
                    return code;
                }
            }
            // The program may be gone by now; then its end is on its way.
            Ok(signal) => match kill(program, signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(_) => return 126,
            },
            Err(Errno::EINTR) => {}
            Err(_) => return 126,
        }
    }
}

/// Reaps all there are; the program's own exit code if it was among them.
fn reap(program: Pid) -> Option<i32> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == program => return Some(code),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == program => return Some(128 + signal as i32),
            Ok(WaitStatus::StillAlive) | Err(_) => return None,
            Ok(_) => {}
        }
    }
}
