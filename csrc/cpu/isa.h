// One source, several instruction sets: every file of csrc/cpu but dispatch.cpp is compiled once for each, SISA_ISA its name and the
// namespace of all that the file defines. What is inline and of no such namespace must be always_inline: of several copies of an
// inline function the linker keeps one, which may be of instructions that this CPU lacks (tools/check_library.py looks).
#pragma once

#ifndef SISA_ISA
#define SISA_ISA portable
#endif
