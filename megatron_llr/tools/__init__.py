"""What the command-line tools call: conversion, comparison and preprocessing."""
